// objects ROUNDS: goroutines over a channel, maps, strings, panics and much garbage, so that the scheduler preempts by
// signal and the collector is at work; prints a digest that depends on every round. It uses no timers and opens no
// files: the runtime would make an epoll descriptor for them.
package main

import (
	"fmt"
	"hash/crc64"
	"math/rand"
	"os"
	"sort"
	"strconv"
)

var table = crc64.MakeTable(crc64.ECMA)

func risky(i int, values []uint64) (sum uint64) {
	defer func() {
		if recover() != nil {
			sum = 17
		}
	}()
	return values[i]
}

func round(random *rand.Rand, words map[string][]uint64) uint64 {
	for i := 0; i < 3000; i++ {
		r := random.Uint64()
		key := strconv.FormatUint(r%8192, 36)
		if old := words[key]; len(old) < 6 {
			words[key] = append(old, r)
		} else {
			words[key] = []uint64{r}
		}
	}
	keys := make([]string, 0, len(words))
	for key := range words {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	var sum uint64
	for i, key := range keys {
		sum = sum*31 + risky(i%7, words[key]) + crc64.Checksum([]byte(key), table)
	}
	return sum
}

type part struct {
	worker int
	sum    uint64
}

func main() {
	rounds, err := strconv.Atoi(os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	parts := make(chan part)
	for worker := 0; worker < 8; worker++ {
		go func(worker int) {
			random, words := rand.New(rand.NewSource(int64(worker))), map[string][]uint64{}
			var sum uint64
			for i := 0; i < rounds; i++ {
				sum = sum*3 + round(random, words)
			}
			parts <- part{worker, sum}
		}(worker)
	}
	var sums [8]uint64
	for range sums {
		p := <-parts
		sums[p.worker] = p.sum
	}
	var digest uint64
	for _, sum := range sums {
		digest = digest*1099511628211 ^ sum
	}
	fmt.Printf("digest %016x\n", digest)
}
