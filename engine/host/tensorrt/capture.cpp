#include "tensorrt/capture.hpp"

#include "error.hpp"

namespace mct {

void* ActivationBlock::pointer() const {
  if (!memory_) {
    throw Error(MCT_RENDER_ERROR,
                "there is no memory for activations; free some on the GPU and open the session "
                "again");
  }
  return memory_.get();
}

void ActivationBlock::reserve(std::size_t size_bytes) {
  // At least one unit, so that there is always an address.
  const std::size_t units = size_bytes == 0 ? 1 : (size_bytes - 1) / alignment_bytes + 1;
  const std::size_t wanted = units * alignment_bytes;
  if (wanted <= this->size_bytes()) {
    return;
  }
  wait_();
  memory_.reset();  // first, so that the two need not fit side by side
  ++generation_;
  memory_ = allocate_(wanted);
  size_bytes_ = wanted;
}

void CapturedSequence::start(Stream stream) {
  if (calls_.empty()) {
    return;
  }
  const std::uint64_t generation = calls_.front()->generation();
  if (generation_ != generation) {
    graph_.reset();
    run_plainly(stream);
    generation_ = generation;
    return;
  }
  if (!graph_ && !problem_) {
    capture();
  }
  if (!graph_) {
    run_plainly(stream);
    return;
  }
  graph_->launch(stream);
  mode_ = Mode::captured;
}

void CapturedSequence::run_plainly(Stream stream) {
  mode_ = Mode::plain;
  for (const auto& call : calls_) {
    call->start(stream);
  }
}

void CapturedSequence::capture() {
  for (const auto& call : calls_) {
    if (problem_ = call->why_not_captured(); problem_) {
      return;
    }
  }
  try {
    graph_ = capture_([this](Stream stream) { run_plainly(stream); });
  } catch (const Error& error) {
    if (error.status() != MCT_RENDER_ERROR) {
      throw;
    }
    problem_ = error.what();
  }
}

}  // namespace mct
