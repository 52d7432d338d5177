// What the host makes of a bundle's plans, line by line, for a test that asks the Python host too.
//
// usage: plan_report BUNDLE FLAVOUR VERSION COMPUTE_CAPABILITY

#include <functional>
#include <iostream>

#include "error.hpp"
#include "tensorrt/plans.hpp"

namespace {

void say(const std::string& what, const std::function<std::string()>& answer) {
  std::cout << what << ": ";
  try {
    std::cout << answer() << '\n';
  } catch (const mct::Error& error) {
    std::cout << error.what() << '\n';
  }
}

void report(const mct::Bundle& bundle, const mct::PlanTarget& target) {
  for (const auto& [name, component] : bundle.exported().components) {
    say(name, [&, name = name, &component = component] {
      std::vector<std::string> paths;
      for (const mct::PlanRecord& record : loadable_plans(bundle, name, component, target)) {
        paths.push_back(checked_plan(bundle, record).filename().string());
      }
      return mct::joined(paths);
    });
  }
  say("precisions", [&] { return mct::joined(planned_precisions(bundle, target)); });
  say("all", [&] {
    check_plans(bundle, target);
    return std::string("planned");
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: plan_report BUNDLE FLAVOUR VERSION COMPUTE_CAPABILITY\n";
    return 2;
  }
  try {
    report(mct::Bundle(argv[1], false), {argv[2], argv[3], argv[4]});
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
