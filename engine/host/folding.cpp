#include "folding.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "error.hpp"

namespace mct {

namespace {

[[noreturn]] void fail(const std::string& text) { throw Error(MCT_SCHEDULE_ERROR, text); }

// What a velocity or latent is of the evaluated velocities, B values.
using Coefficients = std::vector<double>;

Coefficients sum(const Coefficients& one, double factor, const Coefficients& other) {
  Coefficients total = one;
  for (std::size_t k = 0; k < total.size(); ++k) {
    total[k] += factor * other[k];
  }
  return total;
}

Coefficients unit(std::size_t size, std::size_t index) {
  Coefficients values(size, 0.0);
  values[index] = 1.0;
  return values;
}

// What a rule is given: sigma at every step, the nodes and, where it uses them, B spans.
struct Fold {
  const std::vector<double>& sigmas;
  std::vector<std::size_t> nodes;
  std::vector<std::size_t> spans;

  std::size_t budget() const { return nodes.size(); }
  std::size_t steps() const { return sigmas.size() - 1; }
  std::size_t end(std::size_t n) const { return n + 1 < budget() ? nodes[n + 1] : steps(); }
  double width(std::size_t n) const { return sigmas[end(n)] - sigmas[nodes[n]]; }
  // Sigma at the nodes, and at the end of the grid last.
  std::vector<double> levels() const {
    std::vector<double> values;
    for (const std::size_t node : nodes) {
      values.push_back(sigmas[node]);
    }
    values.push_back(sigmas.back());
    return values;
  }
};

// Rows from displacement coefficients, oldest first. Below `negligible` is rounding residue.
Rows rows_from(const std::vector<Coefficients>& moves) {
  constexpr double negligible = 1e-14;
  Rows rows;
  for (std::size_t n = 0; n < moves.size(); ++n) {
    std::vector<double> row(n + 1);
    for (std::size_t age = 0; age <= n; ++age) {
      const double weight = moves[n][n - age];
      row[age] = std::fabs(weight) > negligible ? weight : 0.0;
    }
    while (row.size() > 1 && row.back() == 0.0) {
      row.pop_back();
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

// Velocity and latent at every step so far.
struct Trace {
  std::vector<Coefficients> velocities;
  std::vector<Coefficients> latents;
};

using Estimate =
    std::function<Coefficients(const Trace& trace, std::size_t step, std::size_t node)>;

Rows fold_steps(const Fold& task, const Estimate& estimate) {
  Trace trace{{}, {Coefficients(task.budget(), 0.0)}};
  std::vector<Coefficients> moves;
  for (std::size_t step = 0; step < task.steps(); ++step) {
    Coefficients velocity;
    if (moves.size() < task.budget() && task.nodes[moves.size()] == step) {
      velocity = unit(task.budget(), moves.size());
      moves.emplace_back(task.budget(), 0.0);
    } else {
      velocity = estimate(trace, step, moves.size() - 1);
    }
    const double width = task.sigmas[step + 1] - task.sigmas[step];
    moves.back() = sum(moves.back(), width, velocity);
    trace.latents.push_back(sum(trace.latents.back(), width, velocity));
    trace.velocities.push_back(std::move(velocity));
  }
  return rows_from(moves);
}

// Latent's drift from where the window began, over the window's square.
Coefficients slope(const Fold& task, const Trace& trace, std::size_t step, std::size_t start) {
  const double window = task.sigmas[step] - task.sigmas[start];
  Coefficients drift = sum(trace.latents[step], -1.0, trace.latents[start]);
  drift = sum(drift, -window, trace.velocities[start]);
  for (double& value : drift) {
    value /= window * window;
  }
  return drift;
}

Rows euler(const Fold& task) {
  Rows rows;
  for (std::size_t n = 0; n < task.budget(); ++n) {
    rows.push_back({task.width(n)});
  }
  return rows;
}

Rows ab2(const Fold& task) {
  Rows rows = {{task.width(0)}};
  for (std::size_t n = 1; n < task.budget(); ++n) {
    const double width = task.width(n);
    const double extrapolated = width * (width / task.width(n - 1)) / 2;
    rows.push_back({width + extrapolated, -extrapolated});
  }
  return rows;
}

Rows official(const Fold& task) {
  return fold_steps(task, [&](const Trace& trace, std::size_t step, std::size_t node) {
    const std::size_t start = step - std::min(task.spans[node], step);
    const Coefficients& last = trace.velocities.back();
    if (step - start == 1) {
      return last;
    }
    return sum(last, task.sigmas[step + 1] - task.sigmas[step], slope(task, trace, step, start));
  });
}

Rows paper(const Fold& task) {
  Trace trace{{}, {Coefficients(task.budget(), 0.0)}};
  std::vector<Coefficients> moves;
  for (std::size_t n = 0; n < task.budget(); ++n) {
    const std::size_t start = task.nodes[n];
    const std::size_t end = task.end(n);
    const std::size_t back = start - std::min(task.spans[n], start);
    const Coefficients velocity = unit(task.budget(), n);
    Coefficients jump = velocity;
    if (end != start + 1 && start - back > 1) {
      jump = sum(velocity, task.width(n), slope(task, trace, start, back));
    }
    const Coefficients origin = trace.latents[start];
    for (std::size_t step = start; step < end; ++step) {
      trace.velocities.push_back(step == start ? velocity : jump);
      trace.latents.push_back(sum(origin, task.sigmas[step + 1] - task.sigmas[start], jump));
    }
    moves.push_back(sum(Coefficients(task.budget(), 0.0), task.width(n), jump));
  }
  return rows_from(moves);
}

// Divided differences at every node up to `order`, as far as the history allows.
std::vector<std::vector<Coefficients>> differences(const Fold& task, std::size_t order) {
  std::vector<std::vector<Coefficients>> table;
  for (std::size_t n = 0; n < task.budget(); ++n) {
    std::vector<Coefficients> row = {unit(task.budget(), n)};
    for (std::size_t k = 0; n > 0 && k < std::min(order, table[n - 1].size()); ++k) {
      const double gap = static_cast<double>(task.nodes[n] - task.nodes[n - 1]);
      Coefficients next = sum(row.back(), -1.0, table[n - 1][k]);
      for (double& value : next) {
        value /= gap;
      }
      row.push_back(std::move(next));
    }
    table.push_back(std::move(row));
  }
  return table;
}

Rows taylor(const Fold& task, std::size_t order) {
  const auto table = differences(task, order);
  return fold_steps(task, [&](const Trace&, std::size_t step, std::size_t node) {
    const double ahead = static_cast<double>(step - task.nodes[node]);
    Coefficients velocity(task.budget(), 0.0);
    double factor = 1.0;
    for (std::size_t k = 0; k < table[node].size(); ++k) {
      velocity = sum(velocity, factor, table[node][k]);
      factor *= ahead / static_cast<double>(k + 1);
    }
    return velocity;
  });
}

// λ = log((1 − σ) / σ).
std::vector<double> half_log_snr(const std::vector<double>& levels, double highest) {
  std::vector<double> values;
  for (const double level : levels) {
    const double bounded = std::min(level, highest);
    values.push_back(std::log(std::max(1 - bounded, 0.0)) - std::log(bounded));
  }
  return values;
}

// h / h_before at an interval between nodes; nothing where it is of first order.
std::optional<double> growth(const std::vector<double>& snr, std::size_t interval) {
  if (interval == 0 || interval + 2 >= snr.size() || !std::isfinite(snr[interval]) ||
      !std::isfinite(snr[interval + 1])) {
    return std::nullopt;
  }
  const double before = snr[interval] - snr[interval - 1];
  return before > 0 ? std::optional<double>((snr[interval + 1] - snr[interval]) / before)
                    : std::nullopt;
}

// 1 − σ_t/σ_s; nothing is left to move at σ_s = 0.
double share(const std::vector<double>& levels, std::size_t interval) {
  return levels[interval] == 0 ? 0.0 : 1 - levels[interval + 1] / levels[interval];
}

Rows dpmpp2m(const Fold& task) {
  const std::vector<double> levels = task.levels();
  const std::vector<double> snr = half_log_snr(levels, 2.0);
  Coefficients latent(task.budget(), 0.0);
  std::vector<Coefficients> images;
  std::vector<Coefficients> moves;
  for (std::size_t n = 0; n < task.budget(); ++n) {
    const Coefficients velocity = unit(task.budget(), n);
    images.push_back(sum(latent, -levels[n], velocity));
    Coefficients move = sum(Coefficients(task.budget(), 0.0), levels[n + 1] - levels[n], velocity);
    if (const auto ratio = growth(snr, n)) {
      move = sum(move, share(levels, n) * *ratio / 2, sum(images[n], -1.0, images[n - 1]));
    }
    latent = sum(latent, 1.0, move);
    moves.push_back(std::move(move));
  }
  return rows_from(moves);
}

// What UniPC's corrector adds to the image of the node before the last.
Coefficients correction(const std::vector<double>& snr, const std::vector<Coefficients>& images) {
  const std::size_t last = images.size() - 1;
  const Coefficients fresh = sum(images[last], -1.0, images[last - 1]);
  const Coefficients none(fresh.size(), 0.0);
  const auto ratio = growth(snr, last - 1);
  if (!ratio) {
    return sum(none, 0.5, fresh);
  }
  const double step = snr[last] - snr[last - 1];
  const double grown = std::expm1(-step);
  const double first = -grown / step - 1;
  const double second = -first / step - 0.5;
  const double older = (first - 2 * second) / grown / (1 + 1 / *ratio);
  const Coefficients past = sum(images[last - 2], -1.0, images[last - 1]);
  return sum(sum(none, older * -*ratio, past), first / grown - older, fresh);
}

Rows unipc(const Fold& task) {
  constexpr double highest_level = 1 - 1e-6;  // as diffusers 0.42.1 has it
  const std::vector<double> levels = task.levels();
  const std::vector<double> snr = half_log_snr(levels, highest_level);
  Coefficients predicted(task.budget(), 0.0);
  Coefficients corrected = predicted;
  std::vector<Coefficients> images;
  std::vector<Coefficients> moves;
  for (std::size_t n = 0; n < task.budget(); ++n) {
    const Coefficients velocity = unit(task.budget(), n);
    images.push_back(sum(predicted, -levels[n], velocity));
    if (n > 0) {
      const Coefficients towards =
          sum(sum(images[n - 1], -1.0, corrected), 1.0, correction(snr, images));
      corrected = sum(corrected, share(levels, n - 1), towards);
    }
    Coefficients further = sum(predicted, -1.0, corrected);
    if (const auto ratio = growth(snr, n)) {
      further = sum(further, *ratio / 2, sum(images[n], -1.0, images[n - 1]));
    }
    Coefficients following = sum(corrected, levels[n + 1] - levels[n], velocity);
    following = sum(following, share(levels, n), further);
    moves.push_back(sum(following, -1.0, predicted));
    predicted = std::move(following);
  }
  return rows_from(moves);
}

struct Method {
  std::string name;
  std::function<Rows(const Fold&)> fold;
  bool uses_spans = false;
};

const std::vector<Method>& methods() {
  static const std::vector<Method> table = {
      {"ab2", ab2},
      {"dpmpp2m", dpmpp2m},
      {"euler", euler},
      {"lemica", euler},
      {"official", official, true},
      {"paper", paper, true},
      {"taylor1", [](const Fold& task) { return taylor(task, 1); }},
      {"taylor2", [](const Fold& task) { return taylor(task, 2); }},
      {"threshold", euler},
      {"unipc", unipc},
  };
  return table;
}

// Spans, one for each edge, with 1 for the end of the grid.
std::vector<std::size_t> checked_spans(const Spans& spans, const Nodes& nodes) {
  const std::size_t edges = nodes.size() - 1;
  if (!spans && edges > 0) {
    fail("this method needs " + std::to_string(edges) +
         " spans, one for each edge between nodes; give --spans");
  }
  const std::vector<std::int64_t> given = spans.value_or(std::vector<std::int64_t>());
  if (given.size() != edges) {
    fail(std::to_string(nodes.size()) + " nodes have " + std::to_string(edges) +
         " edges between them and need " + std::to_string(edges) + " spans, found " +
         std::to_string(given.size()) + "; give one span for each edge");
  }
  std::vector<std::size_t> checked;
  for (std::size_t k = 0; k < edges; ++k) {
    if (given[k] < 1 || given[k] > nodes[k] + 1) {
      fail("the span of the edge at node " + text_of(nodes[k]) + " is 1 to " +
           text_of(nodes[k] + 1) + " (the steps of history there), found " + text_of(given[k]) +
           "; 1 reuses the velocity");
    }
    checked.push_back(static_cast<std::size_t>(given[k]));
  }
  checked.push_back(1);
  return checked;
}

}  // namespace

const std::vector<std::string>& method_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const Method& method : methods()) {
      found.push_back(method.name);
    }
    return found;
  }();
  return names;
}

Rows fold(const std::string& name, const std::vector<double>& sigmas, const Nodes& nodes,
          const Spans& spans) {
  check_nodes(nodes, static_cast<std::int64_t>(sigmas.size()) - 1);
  const auto method = std::find_if(methods().begin(), methods().end(),
                                   [&](const Method& entry) { return entry.name == name; });
  if (method == methods().end()) {
    fail("unknown method " + repr_of(name) + "; expected one of " + joined(method_names()));
  }
  if (!method->uses_spans && spans) {
    fail("method " + repr_of(name) + " takes no spans; leave them out");
  }
  Fold task{sigmas, {nodes.begin(), nodes.end()}, {}};
  if (method->uses_spans) {
    task.spans = checked_spans(spans, nodes);
  }
  return method->fold(task);
}

bool is_close(const Rows& one, const Rows& other) {
  constexpr double tolerance = 1e-6;  // float32 weights of the order of 1 resolve 6e-8
  for (std::size_t n = 0; n < one.size(); ++n) {
    const std::size_t length = std::max(one[n].size(), other[n].size());
    for (std::size_t k = 0; k < length; ++k) {
      const double left = k < one[n].size() ? one[n][k] : 0.0;
      const double right = k < other[n].size() ? other[n][k] : 0.0;
      if (!(std::fabs(left - right) <= tolerance)) {
        return false;
      }
    }
  }
  return one.size() == other.size();
}

void check_nodes(const Nodes& nodes, std::int64_t steps) {
  if (nodes.empty() || nodes[0] != 0) {
    const std::string found =
        nodes.empty() ? "the list is empty" : "the list begins with " + text_of(nodes[0]);
    fail("a schedule evaluates the network at step 0, " + found +
         "; add node 0, since there is no earlier velocity to reuse");
  }
  for (std::size_t k = 1; k < nodes.size(); ++k) {
    if (nodes[k] <= nodes[k - 1]) {
      fail("nodes are steps in ascending order, found " + text_of(nodes[k]) + " after " +
           text_of(nodes[k - 1]) + "; sort them and drop repetitions");
    }
  }
  if (nodes.back() >= steps) {
    fail("nodes are steps of a grid of " + text_of(steps) + " steps, 0 to " + text_of(steps - 1) +
         ", found " + text_of(nodes.back()) + "; give a longer grid with --steps, or other nodes");
  }
}

}  // namespace mct
