// The kernels' parallel loops on four std::threads, which ThreadSanitizer understands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace soak {

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  const int64_t parts = std::min<int64_t>(4, (end - begin) / std::max<int64_t>(1, std::min<int64_t>(grain, 4)));
  if (parts < 2) {
    if (begin < end) body(begin, end);
    return;
  }
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t low = begin + (end - begin) * part / parts, high = begin + (end - begin) * (part + 1) / parts;
    threads.emplace_back([&body, low, high] { body(low, high); });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace soak
