import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.ObjectReader;
import java.io.IOException;
import java.time.Duration;
import org.apache.flink.api.common.eventtime.WatermarkStrategy;
import org.apache.flink.api.common.functions.AggregateFunction;
import org.apache.flink.api.common.serialization.AbstractDeserializationSchema;
import org.apache.flink.api.common.serialization.SimpleStringSchema;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.connector.base.DeliveryGuarantee;
import org.apache.flink.connector.kafka.sink.KafkaRecordSerializationSchema;
import org.apache.flink.connector.kafka.sink.KafkaSink;
import org.apache.flink.connector.kafka.source.KafkaSource;
import org.apache.flink.connector.kafka.source.enumerator.initializer.OffsetsInitializer;
import org.apache.flink.core.execution.CheckpointingMode;
import org.apache.flink.streaming.api.environment.StreamExecutionEnvironment;
import org.apache.flink.streaming.api.functions.windowing.ProcessWindowFunction;
import org.apache.flink.streaming.api.windowing.assigners.SlidingEventTimeWindows;
import org.apache.flink.streaming.api.windowing.windows.TimeWindow;
import org.apache.flink.util.Collector;

/** The windows of compare.py on Flink's DataStream API: Windows BROKERS INPUT OUTPUT LENGTH_MS STEP_MS STATE_FOLDER. */
public class Windows {
  public static class Order {
    public String customer_id;
    public double amount;
    public long happened_at;
  }

  public static class Orders extends AbstractDeserializationSchema<Order> {
    private transient ObjectReader reader;

    public Orders() {
      super(Order.class);
    }

    @Override
    public void open(InitializationContext context) {
      reader = new ObjectMapper().configure(DeserializationFeature.FAIL_ON_UNKNOWN_PROPERTIES, false).readerFor(Order.class);
    }

    @Override
    public Order deserialize(byte[] record) throws IOException {
      return reader.readValue(record);
    }
  }

  public static class Amounts {
    public long count;
    public double sum;
    public double min = Double.POSITIVE_INFINITY;
    public double max = Double.NEGATIVE_INFINITY;
  }

  public static class AddUp implements AggregateFunction<Order, Amounts, Amounts> {
    @Override
    public Amounts createAccumulator() {
      return new Amounts();
    }

    @Override
    public Amounts add(Order order, Amounts total) {
      total.count++;
      total.sum += order.amount;
      total.min = Math.min(total.min, order.amount);
      total.max = Math.max(total.max, order.amount);
      return total;
    }

    @Override
    public Amounts merge(Amounts one, Amounts other) {
      one.count += other.count;
      one.sum += other.sum;
      one.min = Math.min(one.min, other.min);
      one.max = Math.max(one.max, other.max);
      return one;
    }

    @Override
    public Amounts getResult(Amounts total) {
      return total;
    }
  }

  public static class Write extends ProcessWindowFunction<Amounts, String, String, TimeWindow> {
    @Override
    public void process(String customer, Context context, Iterable<Amounts> totals, Collector<String> out) {
      Amounts total = totals.iterator().next();
      StringBuilder text = new StringBuilder(160);
      text.append("{\"customer_id\":\"").append(customer).append("\",\"window_start\":").append(context.window().getStart());
      text.append(",\"window_end\":").append(context.window().getEnd()).append(",\"count\":").append(total.count);
      text.append(",\"sum\":").append(total.sum).append(",\"mean\":").append(total.sum / total.count);
      out.collect(text.append(",\"min\":").append(total.min).append(",\"max\":").append(total.max).append('}').toString());
    }
  }

  public static void main(String[] arguments) throws Exception {
    String brokers = arguments[0];
    Duration length = Duration.ofMillis(Long.parseLong(arguments[3])), step = Duration.ofMillis(Long.parseLong(arguments[4]));
    Configuration settings = new Configuration();
    settings.setString("taskmanager.numberOfTaskSlots", "2");
    settings.setString("state.backend.type", "hashmap");
    settings.setString("execution.checkpointing.storage", "filesystem");
    settings.setString("execution.checkpointing.dir", "file://" + arguments[5]);
    settings.setString("pipeline.object-reuse", "true");
    StreamExecutionEnvironment flink = StreamExecutionEnvironment.createLocalEnvironment(2, settings);
    flink.enableCheckpointing(10_000, CheckpointingMode.AT_LEAST_ONCE);
    KafkaSource<Order> orders = KafkaSource.<Order>builder().setBootstrapServers(brokers).setTopics(arguments[1]).setGroupId(arguments[2])
        .setStartingOffsets(OffsetsInitializer.earliest()).setBounded(OffsetsInitializer.latest()).setValueOnlyDeserializer(new Orders()).build();
    KafkaSink<String> sink = KafkaSink.<String>builder().setBootstrapServers(brokers).setDeliveryGuarantee(DeliveryGuarantee.AT_LEAST_ONCE)
        .setRecordSerializer(KafkaRecordSerializationSchema.builder().setTopic(arguments[2]).setValueSerializationSchema(new SimpleStringSchema()).build()).build();
    WatermarkStrategy<Order> clock = WatermarkStrategy.<Order>forBoundedOutOfOrderness(Duration.ofSeconds(5)).withTimestampAssigner((order, time) -> order.happened_at);
    flink.fromSource(orders, clock, "orders").keyBy(order -> order.customer_id).window(SlidingEventTimeWindows.of(length, step))
        .aggregate(new AddUp(), new Write()).sinkTo(sink);
    flink.execute("windows");
    System.exit(0);
  }
}
