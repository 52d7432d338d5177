#include "graphs.hpp"

namespace mct {

std::pair<std::string, const Component*> Graphs::network(const std::string& part) const {
  return bundle_->exported().component_in(part, runtime_->precisions());
}

std::shared_ptr<Graph> Graphs::load(const std::string& name, const Component& component) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Graph> graph = loaded_[name].lock();
  if (!graph) {
    graph = runtime_->load({*bundle_, name, component});
    loaded_[name] = graph;
  }
  return graph;
}

std::shared_ptr<Graphs> SharedBundle::graphs(const std::string& backend,
                                             const RuntimeOptions& options) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Graphs> graphs = opened_[{backend, options}].lock();
  if (!graphs) {
    std::shared_ptr<Runtime> runtime = open_runtime(backend, options, *bundle_);
    const std::string name = runtime->name();
    graphs = opened_[{name, options}].lock();
    if (!graphs) {
      graphs = std::make_shared<Graphs>(bundle_, std::move(runtime));
    }
    opened_[{name, options}] = graphs;
    opened_[{backend, options}] = graphs;  // also where it was left to us
  }
  return graphs;
}

}  // namespace mct
