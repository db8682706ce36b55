// Runs every instruction set's kernels on copies of the same tensors and compares what they leave, bit for bit, with
// what the scalar kernels leave; a NaN need only be a NaN. (Of the scalar kernels themselves this shows no more than
// that they write nowhere else.) It needs neither torch nor Python and can be the only process of a machine, process 1,
// so that it also runs in an emulator of a processor that is not at hand: run.sh.
//
//   compare_isas [--every=N] [--break] [ISA...]
//     --every=N  only every Nth combination of rule and formats
//     --break    flips one bit of what all but the scalar kernels get: differences must be found
//     ISA...     fail unless these, too, run here
// Exit status: 0 no difference, 1 a difference or an ISA that does not run.
#define ADAMFUSED_TARGET host
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "cpu/isa.h"

using namespace adamfused;

namespace {

// Each recipe reaches what another does not: both kinds of decay, maximize, averages told from their far end, eps = 0.
constexpr int kRecipes = 5, kSteps = 3;
constexpr double kLr[kRecipes] = {1e-3, 1e-2, 0.3, 1.0, 1e-4};
constexpr double kFactor[kRecipes] = {1, 0x1p-16, 0.37, 1, 1e-3};
constexpr double kEmaDecay[kRecipes] = {0.999, 0.9, 0.3, 0, 1};
constexpr double kRMSprop[kRecipes][5] = {
    {0.99, 1e-8, 0, 0.9, 0}, {0.9, 1e-6, 0.01, 0, 1},     {0.3, 1e-8, 0, 0.3, 0},
    {0, 0, 0, 0.5, 0},       {0.999, 1e-8, 0.1, 0.99, 0},
};
constexpr double kAdam[kRecipes][7] = {
    {0.9, 0.999, 1e-8, 0, 0, 0, 1}, {0.9, 0.999, 1e-8, 0.01, 1, 0, 1}, {0.3, 0.95, 1e-8, 0.1, 0, 1, 1},
    {0, 0, 0, 0, 0, 0, 0},          {0.95, 0.4, 1e-6, 0.1, 1, 1, 0},
};
const void* recipe(const host::RMSpropHyper&, int i) { return kRMSprop[i]; }
const void* recipe(const host::AdamHyper&, int i) { return kAdam[i]; }

template <class Rule>
std::vector<char> prepare(int step) {
  std::vector<char> made(kRecipes * sizeof(Rule));
  for (int i = 0; i < kRecipes; ++i) {
    typename Rule::Hyper hyper;
    memcpy(&hyper, recipe(hyper, i), sizeof hyper);
    Rule rule = Rule::prepare(hyper, {kLr[i], double(step), kFactor[i], kEmaDecay[i]});
    memcpy(&made[size_t(i) * sizeof rule], &rule, sizeof rule);
  }
  return made;
}

template <class Format>
void put(void* to, double x) {
  *static_cast<typename Format::Rest*>(to) = Format::put(x);
}

template <class Format>
uint64_t bits(const void* from) {  // every NaN gives the same
  auto rest = *static_cast<const typename Format::Rest*>(from);
  uint64_t b = 0;
  memcpy(&b, &rest, sizeof rest);
  return Format::get(rest) != Format::get(rest) ? ~uint64_t(0) : b;
}

const struct RuleFacts {
  const char* name;
  int states;
  std::vector<char> (*prepare[2])(int step);
} kRuleFacts[kRules][2] = {
#define ROW(R, name)                                                                    \
  {{name, host::R<float>::states, {prepare<host::R<float>>, prepare<host::R<double>>}}, \
   {name " averaged",                                                                   \
    host::R<float>::states + 1,                                                         \
    {prepare<host::Averaged<host::R, float>>, prepare<host::Averaged<host::R, double>>}}},
    ADAMFUSED_RULES(ROW)
#undef ROW
};

const struct FormatFacts {
  const char* name;
  size_t size;
  void (*put)(void*, double);
  uint64_t (*bits)(const void*);
} kFormatFacts[kFormats] = {
#define ROW(F, ...) {#F, sizeof(host::F::Rest), put<host::F>, bits<host::F>},
    ADAMFUSED_FORMATS(ROW)
#undef ROW
};

uint64_t seed;

uint64_t random_bits() {  // splitmix64
  uint64_t x = seed += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
int random_below(int n) { return int((random_bits() >> 32) % uint64_t(n)); }

// Of either sign and from 2^low to 2^high; half way between two numbers whose fractions have `kept` bits, if not 52.
double random_number(int low, int high, int kept) {
  uint64_t half = kept < 52 ? uint64_t(1) << (51 - kept) : 0, dropped = half ? 2 * half - 1 : 0;
  uint64_t exponent = uint64_t(1023 + low + random_below(high - low));
  uint64_t b = (random_bits() & 0x800fffffffffffffu & ~dropped) | half | exponent << 52;
  double x;
  memcpy(&x, &b, sizeof x);
  return x;
}

void draw(bool is_state, const FormatFacts& format, uint8_t* to) {
  static const double special[16] = {0,         -0.0,    0,       1,     0x1p-149, 0x1.8p-130, 0x1p-1074, 0x1p-130,
                                     0x1.8p-15, 0x1p-24, 0x1p-25, 65504, 65520,    1e30,       HUGE_VAL,  NAN};
  static const int rare[4][3] = {{-24, 16, 7}, {-24, 16, 10}, {-24, 16, 23}, {-100, 100, 52}};  // ties; 1e-30 to 1e30
  const int kind = random_below(32), *range = rare[kind % 4];
  const uint64_t raw = random_bits();
  if (kind == 31) return (void)memcpy(to, &raw, format.size);  // any bits at all
  double x = kind < 12 ? random_number(range[0], range[1], range[2]) : random_number(-12, 4, 52);
  if (kind == 30) x = special[raw % 16];
  format.put(to, is_state && random_below(32) ? fabs(x) : x);  // of a negative second moment all becomes NaN
}

// One tensor in the memory of an instruction set; it says where in that memory instead of at which address.
struct Tensor {
  Span span;
  int parts;  // the copy, if there is one, is the last
  size_t begin[kSlots], end[kSlots];
};

struct alignas(64) Line : std::array<uint8_t, 64> {};
using Memory = std::vector<Line>;
uint8_t* at(Memory& memory, size_t place) { return memory[0].data() + place; }

struct Batch {
  int rule, copy;  // the place of the copy
  bool averaged, in_double;
  std::vector<Tensor> tensors;
  std::vector<int64_t> first_tile{0};
  size_t size = 0;

  Batch(int rule, bool averaged, FormatId p, FormatId g, FormatId state)
      : rule(rule),
        copy(kState + kRuleFacts[rule][averaged].states),
        averaged(averaged),
        in_double(p == FormatId::F64) {
    for (int n = 0; n <= 70; ++n) add(n, p, g, state);
    for (int n : {1023, 1024, 1025, 2049, 5000}) add(n, p, g, state);
    size += 64;
  }
  void add(int64_t n, FormatId p, FormatId g, FormatId state) {
    Tensor t{};
    t.span.numel = n, t.span.recipe = random_below(kRecipes), t.parts = copy + random_below(2);
    for (int k = 0; k < t.parts; ++k) {
      FormatId format = k == kParam ? p : k == kGrad ? g : random_below(4) ? state : FormatId(random_below(kFormats));
      int width = int(kFormatFacts[int(format)].size), shift = random_below(4) ? random_below(64 / width) * width : 0;
      t.span.format[k] = format;
      t.begin[k] = (size + 127) / 64 * 64 + size_t(shift);  // after guard bytes; 3 in 4 not at the start of a line
      size = t.end[k] = t.begin[k] + size_t(n) * size_t(width);
    }
    tensors.push_back(t);
    first_tile.push_back(first_tile.back() + (n + kTile - 1) / kTile);
  }
  void fill(Memory& memory, int from, int to) const {
    for (const Tensor& t : tensors)
      for (int k = from; k < std::min(to, t.parts); ++k) {
        const FormatFacts& format = kFormatFacts[int(t.span.format[k])];
        for (size_t i = t.begin[k]; i < t.end[k]; i += format.size) draw(k >= kState, format, at(memory, i));
      }
  }
  void run(const Isa& isa, Memory& memory, int step, int64_t cut) const {
    std::vector<Span> spans;
    for (const Tensor& t : tensors) {
      spans.push_back(t.span);
      for (int k = 0; k <= copy; ++k) spans.back().data[k] = k < t.parts ? at(memory, t.begin[k]) : nullptr;
    }
    std::vector<char> rules = kRuleFacts[rule][averaged].prepare[in_double](step);
    Job job{};
    job.rule = RuleId(rule), job.in_double = in_double, job.rules = rules.data();
    job.spans = spans.data(), job.count = int64_t(spans.size()), job.first_tile = first_tile.data();
    isa.table[rule][averaged][in_double](job, 0, cut);  // in two calls, as two threads would
    isa.table[rule][averaged][in_double](job, cut, first_tile.back());
  }
  std::vector<double> sums(const Isa& isa, Memory& memory, SumOf what) const {
    std::vector<Addends> gradients;
    std::vector<int64_t> first_chunk{0};
    for (const Tensor& t : tensors) {
      gradients.push_back({at(memory, t.begin[kGrad]), t.span.format[kGrad], t.span.numel});
      first_chunk.push_back(first_chunk.back() + chunks_of(t.span.numel));
    }
    std::vector<double> sums(size_t(first_chunk.back()));
    isa.sum({what, gradients.data(), int64_t(gradients.size()), first_chunk.data(), sums.data()}, 0,
            first_chunk.back());
    return sums;
  }
};

struct Tally {
  const Isa* isa;
  Memory memory;
  long long compared = 0, different = 0;
  unsigned long long digest = 0;  // of all numbers written: a program gives the same digest on every machine

  // Each number that may be written against `expected`, and all else, gradients and guard bytes, against what it was.
  void compare(const Batch& batch, int step, Memory& before, Memory& expected) {
    size_t place = 0;
    for (const Tensor& t : batch.tensors)
      for (int k = 0; k < t.parts; ++k) {
        if (k == kGrad) continue;
        const FormatFacts& format = kFormatFacts[int(t.span.format[k])];
        if (memcmp(at(before, place), at(memory, place), t.begin[k] - place) != 0)
          report(batch, t, k, step, "wrote outside, before");
        for (place = t.begin[k]; place < t.end[k]; place += format.size, ++compared) {
          uint64_t got = format.bits(at(memory, place)), want = format.bits(at(expected, place));
          if (got != want) report(batch, t, k, step, "differs at", (place - t.begin[k]) / format.size, got, want);
          digest = (digest ^ got) * 0x100000001b3u + 1;
        }
      }
    if (memcmp(at(before, place), at(memory, place), batch.size - place) != 0)
      report(batch, batch.tensors.back(), batch.copy, step, "wrote outside, after");
  }
  void compare_sums(const Batch& batch, int step, Memory& expected) {
    for (SumOf what : {SumOf::Squares, SumOf::Largest}) {
      const std::vector<double> got = batch.sums(*isa, memory, what), want = batch.sums(kIsaTable[0], expected, what);
      for (size_t i = 0; i < got.size(); ++i, ++compared) {
        const uint64_t a = bits<host::F64>(&got[i]), b = bits<host::F64>(&want[i]);
        if (a != b) report(batch, batch.tensors.back(), kGrad, step, "sums differ at", i, a, b);
        digest = (digest ^ a) * 0x100000001b3u + 1;
      }
    }
  }
  void report(const Batch& batch, const Tensor& t, int part, int step, const char* what, size_t i = 0,
              unsigned long long got = 0, unsigned long long want = 0) {
    if (++different > 10) return;
    printf("%s: %s, step %d, recipe %d,", isa->name, kRuleFacts[batch.rule][batch.averaged].name, step, t.span.recipe);
    for (int k = 0; k < t.parts; ++k) printf(" %s", kFormatFacts[int(t.span.format[k])].name);
    printf(", %lld numbers, part %d: %s", (long long)t.span.numel, part, what);
    got != want ? printf(" [%zu] %llx, not %llx\n", i, got, want) : printf("\n");
  }
};

void compare_batch(const Batch& batch, bool flip, std::vector<Tally>& tallies) {
  Memory start(batch.size / sizeof(Line) + 1);
  memset(at(start, 0), 0xa5, batch.size);
  batch.fill(start, kParam, kSlots);
  for (Tally& tally : tallies) {
    tally.memory = start;
    if (flip && &tally != &tallies[0]) *at(tally.memory, batch.tensors.back().begin[kParam]) ^= 1;
  }
  for (int step = 1; step <= kSteps; ++step) {
    if (step > 1) batch.fill(start, kGrad, kGrad + 1);
    int64_t cut = random_below(int(batch.first_tile.back()));
    for (Tally& tally : tallies) {
      for (const Tensor& t : batch.tensors)
        memcpy(at(tally.memory, t.begin[kGrad]), at(start, t.begin[kGrad]), t.end[kGrad] - t.begin[kGrad]);
      batch.run(*tally.isa, tally.memory, step, cut);
      tally.compare(batch, step, start, tallies[0].memory);
      tally.compare_sums(batch, step, tallies[0].memory);
    }
  }
}

int compare_all(int argc, char** argv) {
  int every = 1, number = 0, failed = 0;
  bool flip = false;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i)
    if (std::string arg = argv[i]; arg == "--break")
      flip = true;
    else if (sscanf(argv[i], "--every=%d", &every) != 1)
      wanted.push_back(arg);
  std::vector<Tally> tallies;
  for (const Isa& isa : kIsaTable)
    if (isa.runs_here()) tallies.push_back({&isa, {}});
  for (int rule = 0; rule < 2 * kRules; ++rule)
    for (int f = 0; f < kFormats * kFormats * kFormats; ++f) {
      if (number++ % std::max(every, 1) != 0) continue;
      seed = uint64_t(number);
      const FormatId p(FormatId(f % kFormats)), g(FormatId(f / kFormats % kFormats));
      compare_batch(Batch(rule / 2, rule % 2 != 0, p, g, FormatId(f / kFormats / kFormats)), flip && number == 1,
                    tallies);
    }
  for (Tally& t : tallies) {
    printf("%s: %lld comparisons, %lld differences, digest %016llx\n", t.isa->name, t.compared, t.different, t.digest);
    wanted.erase(std::remove(wanted.begin(), wanted.end(), t.isa->name), wanted.end());
    failed |= t.different != 0;
  }
  for (const std::string& name : wanted) printf("%s: does not run here\n", name.c_str());
  return failed || !wanted.empty();
}

}  // namespace

int main(int argc, char** argv) {
  int status = compare_all(argc, argv);
  if (getpid() != 1) return status;
  printf("exit status %d\n", status);  // as there is no one to return it to
  fflush(stdout), tcdrain(1);
  return reboot(RB_POWER_OFF);
}
