// What the loop itself costs: evaluations whose graphs do nothing. Prints nanoseconds an
// evaluation, without and with a callback.
//
// usage: loop_benchmark EVALUATIONS ROUNDS

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>

#include "function_runtime.hpp"
#include "loop.hpp"

namespace {

double median_ns(mct::DenoisingLoop& loop, int rounds, const mct::OnEvaluation& callback) {
  std::vector<double> found;
  for (int round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    loop.run(nullptr, callback);
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    found.push_back(time.count() / static_cast<double>(loop.budget()));
  }
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: loop_benchmark EVALUATIONS ROUNDS\n";
    return 2;
  }
  mct::Schedule schedule;
  schedule.grid.steps = std::atoi(arguments[1]);
  for (std::int64_t step = 0; step < schedule.grid.steps; ++step) {
    schedule.nodes.push_back(step);
    schedule.weights.push_back({-0.01});
    schedule.grid.timesteps.push_back(1000);
  }
  schedule.history = 1;
  mct::FunctionRuntime runtime;
  mct::Memory memory(runtime);
  const auto graph = std::make_shared<mct::FunctionGraph>([](const mct::Bindings&) {});
  mct::DenoisingLoop loop(runtime, memory, {{"transformer", {graph, "x", "t", "v", 0.001}}},
                          {graph, 1, false}, schedule, {1, 64, 32}, {});
  const int rounds = std::atoi(arguments[2]);
  std::cout << median_ns(loop, rounds, {}) << ' '
            << median_ns(loop, rounds, [](std::int64_t, std::int64_t) { return true; }) << '\n';
  return 0;
}
