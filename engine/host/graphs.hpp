// The graphs of a bundle on one runtime, shared by sessions in any number of threads.

#ifndef MEANCACHE_TRT_HOST_GRAPHS_HPP
#define MEANCACHE_TRT_HOST_GRAPHS_HPP

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "backend.hpp"
#include "bundle.hpp"

namespace mct {

// Each graph is loaded at its first use and lives as long as somebody holds it.
class Graphs {
 public:
  Graphs(std::shared_ptr<const Bundle> bundle, std::shared_ptr<Runtime> runtime)
      : bundle_(std::move(bundle)), runtime_(std::move(runtime)) {}

  const Bundle& bundle() const { return *bundle_; }
  Runtime& runtime() const { return *runtime_; }
  // A network in the precision that the runtime prefers of those that there are.
  std::pair<std::string, const Component*> network(const std::string& part) const;
  std::shared_ptr<Graph> load(const std::string& name, const Component& component);

 private:
  std::shared_ptr<const Bundle> bundle_;
  std::shared_ptr<Runtime> runtime_;
  std::mutex mutex_;
  std::map<std::string, std::weak_ptr<Graph>> loaded_;
};

// A bundle, and the graphs that its sessions share where they ask for the same backend and options.
class SharedBundle {
 public:
  SharedBundle(const std::filesystem::path& directory, bool is_full_check)
      : bundle_(std::make_shared<Bundle>(directory, is_full_check)) {}

  const Bundle& bundle() const { return *bundle_; }
  std::shared_ptr<Graphs> graphs(const std::string& backend, const RuntimeOptions& options);

 private:
  std::shared_ptr<const Bundle> bundle_;
  std::mutex mutex_;
  std::map<std::pair<std::string, RuntimeOptions>, std::weak_ptr<Graphs>> opened_;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_GRAPHS_HPP
