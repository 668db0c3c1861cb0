import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.ObjectReader;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.OffsetSpec;
import org.apache.kafka.clients.consumer.OffsetAndMetadata;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.serialization.Serializer;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.Suppressed;
import org.apache.kafka.streams.kstream.TimeWindows;

/** The windows of compare.py on Kafka Streams' DSL: Windows BROKERS INPUT OUTPUT LENGTH_MS STEP_MS STATE_FOLDER. Ends when it has read all. */
public class Windows {
  static class Order {
    public String customer_id;
    public double amount;
    public long happened_at;
  }

  static class Amounts {
    long count;
    double sum;
    double min = Double.POSITIVE_INFINITY;
    double max = Double.NEGATIVE_INFINITY;

    Amounts add(Order order) {
      count++;
      sum += order.amount;
      min = Math.min(min, order.amount);
      max = Math.max(max, order.amount);
      return this;
    }
  }

  static Serde<Order> orders() {
    ObjectReader reader = new ObjectMapper().configure(DeserializationFeature.FAIL_ON_UNKNOWN_PROPERTIES, false).readerFor(Order.class);
    Deserializer<Order> read = (topic, record) -> {
      try {
        return reader.readValue(record);
      } catch (IOException e) {
        throw new RuntimeException(e);
      }
    };
    return Serdes.serdeFrom((topic, order) -> { throw new UnsupportedOperationException(); }, read);
  }

  static Serde<Amounts> amounts() {
    Serializer<Amounts> write = (topic, a) -> a == null ? null : ByteBuffer.allocate(32).putLong(a.count).putDouble(a.sum).putDouble(a.min).putDouble(a.max).array();
    Deserializer<Amounts> read = (topic, bytes) -> {
      if (bytes == null) return null;
      ByteBuffer in = ByteBuffer.wrap(bytes);
      Amounts a = new Amounts();
      a.count = in.getLong();
      a.sum = in.getDouble();
      a.min = in.getDouble();
      a.max = in.getDouble();
      return a;
    };
    return Serdes.serdeFrom(write, read);
  }

  public static void main(String[] arguments) throws Exception {
    String input = arguments[1], output = arguments[2];
    Duration length = Duration.ofMillis(Long.parseLong(arguments[3])), step = Duration.ofMillis(Long.parseLong(arguments[4]));
    Properties settings = new Properties();
    settings.put(StreamsConfig.APPLICATION_ID_CONFIG, output);
    settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, arguments[0]);
    settings.put(StreamsConfig.STATE_DIR_CONFIG, arguments[5]);
    settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, 2);
    settings.put("auto.offset.reset", "earliest");
    StreamsBuilder builder = new StreamsBuilder();
    Consumed<String, Order> read = Consumed.with(Serdes.String(), orders()).withTimestampExtractor((record, time) -> ((Order) record.value()).happened_at);
    builder.stream(input, read)
        .groupByKey(Grouped.with(Serdes.String(), orders()))
        .windowedBy(TimeWindows.ofSizeAndGrace(length, Duration.ofSeconds(5)).advanceBy(step))
        .aggregate(Amounts::new, (customer, order, total) -> total.add(order), Materialized.with(Serdes.String(), amounts()))
        .suppress(Suppressed.untilWindowCloses(Suppressed.BufferConfig.unbounded()))
        .toStream((window, total) -> window.key() + "@" + window.window().start())
        .mapValues((at, a) -> {
          int cut = at.lastIndexOf('@');
          StringBuilder text = new StringBuilder(160);
          text.append("{\"customer_id\":\"").append(at, 0, cut).append("\",\"window_start\":").append(at, cut + 1, at.length()).append(",\"count\":").append(a.count);
          text.append(",\"sum\":").append(a.sum).append(",\"mean\":").append(a.sum / a.count);
          return text.append(",\"min\":").append(a.min).append(",\"max\":").append(a.max).append('}').toString();
        })
        .to(output, Produced.with(Serdes.String(), Serdes.String()));
    KafkaStreams streams = new KafkaStreams(builder.build(), settings);
    CountDownLatch failed = new CountDownLatch(1);
    streams.setUncaughtExceptionHandler(error -> { error.printStackTrace(); failed.countDown(); return null; });
    streams.start();
    try (Admin admin = Admin.create(Map.of("bootstrap.servers", arguments[0]))) {
      List<TopicPartition> partitions = admin.describeTopics(List.of(input)).allTopicNames().get().get(input).partitions().stream()
          .map(p -> new TopicPartition(input, p.partition())).collect(Collectors.toList());
      Map<TopicPartition, Long> ends = admin.listOffsets(partitions.stream().collect(Collectors.toMap(p -> p, p -> OffsetSpec.latest()))).all().get()
          .entrySet().stream().collect(Collectors.toMap(Map.Entry::getKey, e -> e.getValue().offset()));
      // How far the threads have read, without waiting for the commit that comes every half minute.
      while (!failed.await(100, TimeUnit.MILLISECONDS)) {
        long lag = streams.metrics().values().stream().filter(m -> m.metricName().name().equals("records-lag") && input.equals(m.metricName().tags().get("topic")))
            .mapToLong(m -> ((Double) m.metricValue()).longValue()).sum();
        double processed = streams.metrics().values().stream().filter(m -> m.metricName().name().equals("process-total") && m.metricName().group().equals("stream-thread-metrics"))
            .mapToDouble(m -> (Double) m.metricValue()).sum();
        if (lag == 0 && processed >= ends.values().stream().mapToLong(Long::longValue).sum()) break;
      }
    }
    boolean ended = streams.close(Duration.ofMinutes(1));
    System.exit(failed.getCount() == 1 && ended ? 0 : 1);
  }
}
