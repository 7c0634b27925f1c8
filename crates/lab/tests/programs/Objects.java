/* Objects ROUNDS: four threads with maps, strings, exceptions and much garbage, so that compiler and collector threads
 * are at work; prints a digest that depends on every round. */
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import java.util.TreeMap;
import java.util.zip.CRC32;

public class Objects {
	static long round(Random random, TreeMap<String, int[]> table) {
		CRC32 crc = new CRC32();
		for (int i = 0; i < 3000; i++) {
			long r = random.nextLong();
			String key = Long.toString(r & 0x3fff, 36);
			table.merge(key, new int[] {(int) r, i}, (a, b) -> new int[] {a[0] * 31 + b[0], a[1] + b[1]});
			crc.update((key + r).getBytes());
		}
		long sum = crc.getValue();
		for (var e : table.entrySet()) {
			try {
				sum = sum * 31 + e.getValue()[e.getValue()[0] & 3] + e.getKey().hashCode();
			} catch (ArrayIndexOutOfBoundsException x) {
				sum = sum * 37 + 1;
			}
		}
		while (table.size() > 12000)
			table.pollFirstEntry();
		return sum;
	}

	public static void main(String[] args) throws InterruptedException {
		int rounds = Integer.parseInt(args[0]);
		long[] sums = new long[4];
		List<Thread> threads = new ArrayList<>();
		for (int t = 0; t < 4; t++) {
			int me = t;
			Thread thread = new Thread(() -> {
				Random random = new Random(me);
				TreeMap<String, int[]> table = new TreeMap<>();
				for (int i = 0; i < rounds; i++)
					sums[me] = sums[me] * 3 + round(random, table);
			});
			thread.start();
			threads.add(thread);
		}
		long digest = 0;
		for (int t = 0; t < 4; t++) {
			threads.get(t).join();
			digest = digest * 1099511628211L ^ sums[t];
		}
		System.out.printf("digest %016x%n", digest);
	}
}
