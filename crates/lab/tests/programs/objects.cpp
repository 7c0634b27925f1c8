// objects ROUNDS: four threads with containers, virtual calls, exceptions, futures and thread-local state; prints a digest
// that depends on every round.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

struct Shape {
	virtual ~Shape() = default;
	virtual uint64_t area() const = 0;
};
struct Square : Shape {
	uint64_t a;
	explicit Square(uint64_t a) : a(a) {}
	uint64_t area() const override { return a * a; }
};
struct Odd : Shape {
	std::string name;
	explicit Odd(std::string n) : name(std::move(n)) {}
	uint64_t area() const override { throw std::runtime_error(name); }
};

static thread_local uint64_t calls;

static uint64_t one_round(std::mt19937_64 &random, std::map<std::string, std::unique_ptr<Shape>> &shapes)
{
	std::unordered_map<uint64_t, std::vector<uint64_t>> groups;
	for (int i = 0; i < 2000; i++) {
		uint64_t r = random();
		std::string name = std::to_string(r % 5000);
		if (r % 7)
			shapes[name] = std::make_unique<Square>(r % 1000);
		else
			shapes[name] = std::make_unique<Odd>(name);
		groups[r % 61].push_back(r);
	}
	uint64_t sum = 0;
	for (auto &[name, shape] : shapes) {
		calls++;
		try {
			sum = sum * 31 + shape->area();
		} catch (const std::exception &e) {
			sum = sum * 37 + std::hash<std::string>{}(e.what()) % 1009;
		}
	}
	for (uint64_t g = 0; g < 61; g++)
		for (uint64_t v : groups[g])
			sum = sum * 1099511628211ull ^ v;
	return sum;
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 100;
	std::vector<std::future<uint64_t>> parts;
	for (int t = 0; t < 4; t++)
		parts.push_back(std::async(std::launch::async, [=] {
			std::mt19937_64 random(t);
			std::map<std::string, std::unique_ptr<Shape>> shapes;
			uint64_t sum = 0;
			for (int i = 0; i < rounds; i++)
				sum = sum * 3 + one_round(random, shapes);
			return sum ^ calls;
		}));
	uint64_t digest = 0;
	for (auto &part : parts)
		digest = digest * 1099511628211ull ^ part.get();
	printf("digest %016llx\n", (unsigned long long)digest);
}
