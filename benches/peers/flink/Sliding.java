import java.time.Duration;
import java.util.ArrayList;
import org.apache.flink.api.common.eventtime.WatermarkStrategy;
import org.apache.flink.api.common.functions.OpenContext;
import org.apache.flink.api.common.serialization.SimpleStringSchema;
import org.apache.flink.api.common.state.ValueState;
import org.apache.flink.api.common.state.ValueStateDescriptor;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.connector.base.DeliveryGuarantee;
import org.apache.flink.connector.kafka.sink.KafkaRecordSerializationSchema;
import org.apache.flink.connector.kafka.sink.KafkaSink;
import org.apache.flink.connector.kafka.source.KafkaSource;
import org.apache.flink.connector.kafka.source.enumerator.initializer.OffsetsInitializer;
import org.apache.flink.core.execution.CheckpointingMode;
import org.apache.flink.streaming.api.environment.StreamExecutionEnvironment;
import org.apache.flink.streaming.api.functions.KeyedProcessFunction;
import org.apache.flink.util.Collector;

/**
 * The sliding windows of compare.py on Flink, written by hand: for each event, in event-time order, what the 10 minutes and the hour up to it
 * hold. Sliding BROKERS INPUT OUTPUT STATE_FOLDER.
 *
 * <p>SQL's OVER RANGE says the same in two lines, and walks a customer's whole hour for each event: far slower.
 */
public class Sliding {
  static final long SHORT = 600_000, LONG = 3_600_000;

  /** A customer's events: a queue with the hour, the first of the 10 minutes in it, and what waits for the watermark. */
  public static class Customer {
    public long[] times = new long[4];
    public long[] cents = new long[4];
    public int head, size, recent;
    public long shortSum, longSum;
    public ArrayList<long[]> waiting = new ArrayList<>();

    void add(long time, long amount) {
      if (size == times.length) {
        long[] t = new long[2 * size], c = new long[2 * size];
        for (int i = 0; i < size; i++) {
          t[i] = times[(head + i) & (size - 1)];
          c[i] = cents[(head + i) & (size - 1)];
        }
        times = t;
        cents = c;
        head = 0;
      }
      int mask = times.length - 1;
      times[(head + size) & mask] = time;
      cents[(head + size) & mask] = amount;
      size++;
      shortSum += amount;
      longSum += amount;
      for (; times[(head + recent) & mask] <= time - SHORT; recent++) shortSum -= cents[(head + recent) & mask];
      for (; times[head] <= time - LONG; head = (head + 1) & mask, size--, recent--) longSum -= cents[head];
    }
  }

  public static class Roll extends KeyedProcessFunction<String, Windows.Order, String> {
    private transient ValueState<Customer> state;

    @Override
    public void open(OpenContext context) {
      state = getRuntimeContext().getState(new ValueStateDescriptor<>("customer", Customer.class));
    }

    @Override
    public void processElement(Windows.Order order, Context context, Collector<String> out) throws Exception {
      Customer customer = state.value();
      if (customer == null) customer = new Customer();
      int at = customer.waiting.size();
      while (at > 0 && customer.waiting.get(at - 1)[0] > order.happened_at) at--;
      customer.waiting.add(at, new long[] {order.happened_at, Math.round(order.amount * 100)});
      context.timerService().registerEventTimeTimer(order.happened_at);
      state.update(customer);
    }

    @Override
    public void onTimer(long time, OnTimerContext context, Collector<String> out) throws Exception {
      Customer customer = state.value();
      int done = 0;
      for (; done < customer.waiting.size() && customer.waiting.get(done)[0] <= time; done++) {
        long[] event = customer.waiting.get(done);
        customer.add(event[0], event[1]);
        StringBuilder text = new StringBuilder(200);
        text.append("{\"customer_id\":\"").append(context.getCurrentKey()).append("\",\"event_time\":").append(event[0]);
        text.append(",\"count_10m\":").append(customer.size - customer.recent).append(",\"sum_10m\":").append(customer.shortSum / 100.0);
        text.append(",\"count_1h\":").append(customer.size).append(",\"sum_1h\":").append(customer.longSum / 100.0);
        out.collect(text.append(",\"mean_1h\":").append(customer.longSum / 100.0 / customer.size).append('}').toString());
      }
      customer.waiting.subList(0, done).clear();
      state.update(customer);
    }
  }

  public static void main(String[] arguments) throws Exception {
    Configuration settings = new Configuration();
    settings.setString("taskmanager.numberOfTaskSlots", "2");
    settings.setString("state.backend.type", "hashmap");
    settings.setString("execution.checkpointing.storage", "filesystem");
    settings.setString("execution.checkpointing.dir", "file://" + arguments[3]);
    settings.setString("pipeline.object-reuse", "true");
    StreamExecutionEnvironment flink = StreamExecutionEnvironment.createLocalEnvironment(2, settings);
    flink.enableCheckpointing(10_000, CheckpointingMode.AT_LEAST_ONCE);
    KafkaSource<Windows.Order> orders = KafkaSource.<Windows.Order>builder().setBootstrapServers(arguments[0]).setTopics(arguments[1]).setGroupId(arguments[2])
        .setStartingOffsets(OffsetsInitializer.earliest()).setBounded(OffsetsInitializer.latest()).setValueOnlyDeserializer(new Windows.Orders()).build();
    KafkaSink<String> sink = KafkaSink.<String>builder().setBootstrapServers(arguments[0]).setDeliveryGuarantee(DeliveryGuarantee.AT_LEAST_ONCE)
        .setRecordSerializer(KafkaRecordSerializationSchema.builder().setTopic(arguments[2]).setValueSerializationSchema(new SimpleStringSchema()).build()).build();
    WatermarkStrategy<Windows.Order> clock =
        WatermarkStrategy.<Windows.Order>forBoundedOutOfOrderness(Duration.ofSeconds(5)).withTimestampAssigner((order, time) -> order.happened_at);
    flink.fromSource(orders, clock, "orders").keyBy(order -> order.customer_id).process(new Roll()).sinkTo(sink);
    flink.execute("sliding");
    System.exit(0);
  }
}
