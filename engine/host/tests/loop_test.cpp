// The loop on a runtime of plain functions, against closed forms.

#include "loop.hpp"

#include <cmath>
#include <limits>

#include "check.hpp"
#include "function_runtime.hpp"

namespace {

using mct::Bindings;
using mct::FunctionGraph;
using mct::FunctionRuntime;
using mct::FunctionTensor;
using mct::Shape;
using mct::TensorPtr;

// v = timestep·x + offset, so that every evaluation differs.
void network(const Bindings& tensors) {
  const std::vector<float>& latent = values_of(tensors, "x");
  const std::vector<float>& offset = values_of(tensors, "offset");
  for (std::size_t k = 0; k < latent.size(); ++k) {
    values_of(tensors, "v")[k] = values_of(tensors, "t")[0] * latent[k] + offset[0];
  }
}

// The second stage's, which has the opposite velocity.
void negated_network(const Bindings& tensors) {
  network(tensors);
  for (float& value : values_of(tensors, "v")) {
    value = -value;
  }
}

// next = latent + Σ weights[j]·v_j, youngest first, as the update graph adds.
void update(const Bindings& tensors) {
  const std::vector<float>& weights = values_of(tensors, "weights");
  values_of(tensors, "velocity") = values_of(tensors, "model_output");
  std::vector<float> next = values_of(tensors, "latent");
  for (std::size_t age = 0; age < weights.size(); ++age) {
    const std::vector<float>& velocity =
        values_of(tensors, age == 0 ? "velocity" : "history_" + std::to_string(age));
    for (std::size_t k = 0; k < next.size(); ++k) {
      next[k] += weights[age] * velocity[k];
    }
  }
  values_of(tensors, "next_latent") = next;
}

constexpr std::int64_t steps = 6;

mct::Schedule schedule_of(const mct::Nodes& nodes, const mct::Rows& rows) {
  mct::Schedule schedule;
  schedule.grid.steps = steps;
  for (std::int64_t step = 0; step <= steps; ++step) {
    schedule.grid.sigmas.push_back(1 - static_cast<double>(step) / steps);
    schedule.grid.timesteps.push_back(1000 * schedule.grid.sigmas.back());
  }
  schedule.grid.timesteps.pop_back();
  schedule.nodes = nodes;
  schedule.weights = rows.empty() ? mct::fold("euler", schedule.grid.sigmas, nodes, {}) : rows;
  for (const auto& row : schedule.weights) {
    schedule.history = std::max(schedule.history, static_cast<std::int64_t>(row.size()));
  }
  return schedule;
}

// A loop over two values and all that it is bound to.
struct Subject {
  explicit Subject(const mct::Schedule& schedule, std::size_t history)
      : memory(runtime), offset(memory.of({0.25f})) {
    const mct::Network net{std::make_shared<FunctionGraph>(network), "x", "t", "v", 0.001};
    const mct::Update move{std::make_shared<FunctionGraph>(update), history, false};
    const mct::Network second{std::make_shared<FunctionGraph>(negated_network), "x", "t", "v",
                              0.001};
    const mct::Networks networks{{"transformer", net}, {"transformer_2", second}};
    loop = std::make_unique<mct::DenoisingLoop>(runtime, memory, networks, move, schedule,
                                                Shape{1, 2}, Bindings{{"offset", offset}});
  }

  std::vector<float> run(const std::vector<float>& start, const mct::OnEvaluation& callback = {}) {
    loop->initial()->write(start.data(), MCT_HOST, nullptr);
    is_done = loop->run(nullptr, callback);
    return static_cast<FunctionTensor&>(*loop->final_latent()).values;
  }

  FunctionRuntime runtime;
  mct::Memory memory;
  TensorPtr offset;
  std::unique_ptr<mct::DenoisingLoop> loop;
  bool is_done = false;
};

// The recursion itself, over all velocities.
std::vector<float> unfolded(const mct::Schedule& schedule, std::vector<float> latent) {
  std::vector<std::vector<float>> velocities;
  const std::vector<float> timesteps = schedule.timesteps();
  for (std::size_t n = 0; n < timesteps.size(); ++n) {
    const auto fed = static_cast<float>(static_cast<double>(timesteps[n]) * 0.001);
    std::vector<float> velocity;
    const auto& stage = schedule.grid.second_stage;
    const float sign = stage && timesteps[n] < stage->boundary_timestep ? -1.0f : 1.0f;
    for (const float value : latent) {
      velocity.push_back(sign * (fed * value + 0.25f));
    }
    velocities.push_back(velocity);
    for (std::size_t age = 0; age < schedule.weights[n].size(); ++age) {
      for (std::size_t k = 0; k < latent.size(); ++k) {
        latent[k] += static_cast<float>(schedule.weights[n][age]) * velocities[n - age][k];
      }
    }
  }
  return latent;
}

const std::vector<float> start = {0.5f, -1.25f};

void all_steps_evaluated_bit_equals_euler() {
  const mct::Schedule schedule = schedule_of({0, 1, 2, 3, 4, 5}, {});
  Subject subject(schedule, 1);
  expect(subject.run(start) == unfolded(schedule, start), "B = T is Euler's method, bit for bit");
}

void history_is_read_in_order_of_age() {
  const mct::Rows rows = {{-0.1}, {-0.2, 0.05}, {-0.1, 0.02, -0.01}, {-0.3, 0.1, -0.02}};
  const mct::Schedule schedule = schedule_of({0, 1, 3, 4}, rows);
  for (const std::size_t history : {3, 4, 8}) {
    Subject subject(schedule, history);
    expect(subject.run(start) == unfolded(schedule, start),
           "rotating slots, H = " + std::to_string(history));
    expect(subject.run(start) == unfolded(schedule, start), "a second run is the same");
  }
}

void each_row_runs_the_network_that_it_names_over_one_history() {
  const mct::Rows rows = {{-0.1}, {-0.2, 0.05}, {-0.1, 0.02, -0.01}, {-0.3, 0.1, -0.02}};
  mct::Schedule schedule = schedule_of({0, 1, 3, 4}, rows);
  const double third = schedule.timesteps()[2];
  const auto names = [&](double boundary) {
    schedule.grid.second_stage = mct::SecondStage{boundary, std::nullopt};
    std::string text;
    for (const std::string& name : schedule.transformers()) {
      text += name == "transformer_2" ? '2' : '1';
    }
    return text;
  };
  expect(names(2000) == "2222" && names(0) == "1111", "boundaries beyond either end");
  expect(names(third) == "1112", "a timestep at the boundary is the first one's");
  for (const double boundary : {2000.0, third + 1, third, 0.0}) {
    schedule.grid.second_stage = mct::SecondStage{boundary, std::nullopt};
    Subject subject(schedule, 4);
    expect(subject.run(start) == unfolded(schedule, start),
           "boundary at " + std::to_string(boundary));
  }
}

void nan_of_a_failed_run_does_not_reach_the_next() {
  const mct::Rows rows = {{-0.1}, {-0.2, 0.05}, {-0.1}};
  Subject subject(schedule_of({0, 1, 3}, rows), 4);
  const std::vector<float> before = subject.run(start);
  const std::vector<float> bad = subject.run({std::numeric_limits<float>::quiet_NaN(), 0});
  expect(std::isnan(bad[0]), "the failed run is NaN");
  expect(subject.run(start) == before, "the next one is as if nothing had been");
}

void a_callback_counts_and_cancels() {
  const mct::Schedule schedule = schedule_of({0, 2, 4}, {});
  Subject subject(schedule, 1);
  std::vector<std::int64_t> counted;
  subject.run(start, [&](std::int64_t done, std::int64_t budget) {
    counted.push_back(10 * done + budget);
    return true;
  });
  expect(counted == std::vector<std::int64_t>({13, 23, 33}), "(1, 3), (2, 3), (3, 3)");
  subject.run(start, [](std::int64_t done, std::int64_t) { return done < 2; });
  expect(!subject.is_done, "cancelled after the second evaluation");
  expect(subject.run(start) == unfolded(schedule, start), "a cancelled loop runs again");
}

void memory_counts_what_it_made() {
  FunctionRuntime runtime;
  mct::Memory memory(runtime);
  memory.zeros({2, 3}, MCT_FLOAT32);
  memory.of({1.0f, 2.0f});
  expect(memory.size_bytes() == 6 * 4 + 2 * 4, "bytes of all tensors");
}

}  // namespace

int main() {
  all_steps_evaluated_bit_equals_euler();
  history_is_read_in_order_of_age();
  each_row_runs_the_network_that_it_names_over_one_history();
  nan_of_a_failed_run_does_not_reach_the_next();
  a_callback_counts_and_cancels();
  memory_counts_what_it_made();
  return failures == 0 ? 0 : 1;
}
