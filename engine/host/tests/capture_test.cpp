// When a sequence of calls runs plainly, is captured and replayed, and the memory that it shares.

#include "tensorrt/capture.hpp"

#include <cstdlib>

#include "check.hpp"

namespace {

using mct::ActivationBlock;
using mct::CapturedSequence;
using mct::CapturedWork;
using mct::Startable;
using mct::Stream;
using Mode = mct::CapturedSequence::Mode;
using Enqueue = std::function<void(Stream)>;

// Notes what is asked of it, as a device would see it.
struct Recorded {
  std::string log;
  std::uint64_t generation = 1;
  std::optional<std::string> problem;
  int live_graphs = 0;

  class Call : public Startable {
   public:
    Call(Recorded& device, char name) : device_(device), name_(name) {}
    void start(Stream) override { device_.log += name_; }
    std::uint64_t generation() const override { return device_.generation; }
    std::optional<std::string> why_not_captured() const override { return device_.problem; }

   private:
    Recorded& device_;
    char name_;
  };

  class Graph : public CapturedWork {
   public:
    explicit Graph(Recorded& device) : device_(device) { ++device_.live_graphs; }
    ~Graph() override { --device_.live_graphs; }
    void launch(Stream) override { device_.log += '!'; }

   private:
    Recorded& device_;
  };

  std::unique_ptr<CapturedSequence> sequence() {
    std::vector<std::shared_ptr<Startable>> calls = {std::make_shared<Call>(*this, 'a'),
                                                     std::make_shared<Call>(*this, 'b')};
    return std::make_unique<CapturedSequence>(calls, [this](const Enqueue& enqueue) {
      log += '[';
      enqueue(nullptr);
      log += ']';
      return std::make_unique<Graph>(*this);
    });
  }
};

void the_first_use_is_plain_and_later_ones_replay_one_capture() {
  Recorded device;
  const auto sequence = device.sequence();
  expect(sequence->mode() == Mode::unused, "starts unused");
  sequence->start(nullptr);
  expect(sequence->mode() == Mode::plain, "runs plainly at first");
  sequence->start(nullptr);
  sequence->start(nullptr);
  expect(device.log == "ab[ab]!!", "one plain run, one capture, two launches: " + device.log);
  expect(sequence->mode() == Mode::captured, "is captured then");
}

void a_block_that_moved_makes_it_run_plainly_and_be_captured_again() {
  Recorded device;
  const auto sequence = device.sequence();
  sequence->start(nullptr);
  sequence->start(nullptr);
  device.log.clear();
  device.generation = 2;
  sequence->start(nullptr);
  expect(device.live_graphs == 0, "what holds the old address is freed");
  sequence->start(nullptr);
  expect(device.log == "ab[ab]!", "plain, then captured again: " + device.log);
}

void what_cannot_be_captured_stays_a_list_of_calls_and_says_why() {
  Recorded device;
  device.problem = "the weights of transformer are streamed";
  const auto sequence = device.sequence();
  for (int use = 0; use < 3; ++use) {
    sequence->start(nullptr);
  }
  expect(device.log == "ababab", "runs plainly each time: " + device.log);
  expect(sequence->problem() == device.problem, "says why");
}

void a_capture_that_fails_is_not_tried_again() {
  Recorded device;
  int tries = 0;
  CapturedSequence sequence({std::make_shared<Recorded::Call>(device, 'a')},
                            [&](const Enqueue&) -> std::unique_ptr<CapturedWork> {
                              ++tries;
                              throw mct::Error(MCT_RENDER_ERROR, "CUDA could not capture");
                            });
  for (int use = 0; use < 3; ++use) {
    sequence.start(nullptr);
  }
  expect(tries == 1 && device.log == "aaa", "runs plainly: " + device.log);
  expect(sequence.problem() == std::string("CUDA could not capture"), "says why");
}

void an_error_of_a_call_goes_through_and_leaves_the_sequence_usable() {
  Recorded device;
  bool is_failing = true;
  class Failing : public Startable {
   public:
    explicit Failing(const bool& is_failing) : is_failing_(is_failing) {}
    void start(Stream) override {
      if (is_failing_) {
        throw mct::Error(MCT_RENDER_ERROR, "could not be started");
      }
    }
    std::uint64_t generation() const override { return 1; }
    std::optional<std::string> why_not_captured() const override { return std::nullopt; }

   private:
    const bool& is_failing_;
  };
  CapturedSequence sequence({std::make_shared<Failing>(is_failing)}, [&](const Enqueue& enqueue) {
    enqueue(nullptr);
    return std::make_unique<Recorded::Graph>(device);
  });
  expect_error([&] { sequence.start(nullptr); }, "could not be started");
  is_failing = false;
  sequence.start(nullptr);
  expect(sequence.mode() == Mode::plain, "the first run that succeeds is plain");
  sequence.start(nullptr);
  expect(sequence.mode() == Mode::captured, "then it is captured");
}

void the_block_grows_in_aligned_steps_and_counts_its_moves() {
  std::size_t allocated = 0;
  std::string log;
  bool is_full = false;
  ActivationBlock block(
      [&](std::size_t size) {
        if (is_full) {
          throw mct::Error(MCT_RENDER_ERROR, "expected memory on the GPU");
        }
        allocated = size;
        log += '+';
        return std::shared_ptr<void>(std::malloc(size), [&log](void* memory) {
          log += '-';
          std::free(memory);
        });
      },
      [&log] { log += 'w'; });
  expect_error([&] { block.pointer(); }, "there is no memory for activations");
  block.reserve(0);
  expect(allocated == mct::alignment_bytes && block.generation() == 1,
         "has an address for nothing");
  block.reserve(256);
  expect(block.generation() == 1, "stays where it is large enough");
  block.reserve(257);
  expect(allocated == 512 && block.size_bytes() == 512, "is a multiple of the alignment");
  expect(block.generation() == 2, "counts its moves");
  // Waits before the old memory goes, and the new one comes after that.
  expect(log == "w+w-+", "wait, free, allocate: " + log);
  is_full = true;
  expect_error([&] { block.reserve(1024); }, "expected memory on the GPU");
  expect_error([&] { block.pointer(); }, "there is no memory for activations");
  expect(block.size_bytes() == 0, "has no size then");
  is_full = false;
  block.reserve(512);
  expect(block.generation() == 4 && block.pointer() != nullptr, "comes back where there is room");
}

}  // namespace

int main() {
  the_first_use_is_plain_and_later_ones_replay_one_capture();
  a_block_that_moved_makes_it_run_plainly_and_be_captured_again();
  what_cannot_be_captured_stays_a_list_of_calls_and_says_why();
  a_capture_that_fails_is_not_tried_again();
  an_error_of_a_call_goes_through_and_leaves_the_sequence_usable();
  the_block_grows_in_aligned_steps_and_counts_its_moves();
  return failures == 0 ? 0 : 1;
}
