// Runs every instruction set's kernels on copies of the same tensors and compares what they leave, bit for bit, with
// what the scalar kernels leave; a NaN need only be a NaN. It needs neither torch nor Python and can be the only
// process of a machine (process 1), so that it also runs in an emulator of a processor that is not at hand: run.sh.
//
//   compare_isas [--every N] [--break] [ISA...]
//     --every N  only every Nth combination of rule and formats
//     --break    flips one bit of what the others get: a difference must be found
//     ISA...     fail unless these, too, run here
// Exit status: 0 no difference, 1 a difference or an ISA that does not run, 2 wrong usage.
#define ADAMFUSED_TARGET host
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

#include <vector>

#include "cpu/isa.h"

using namespace adamfused;

namespace {

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  int below(int n) { return int((bits() >> 32) % uint64_t(n)); }
  // From 2^low to 2^high in magnitude, of either sign. Of the fraction's 52 bits those in `fraction` are kept.
  double number(int low, int high, uint64_t fraction = ~uint64_t(0), uint64_t set = 0) {
    uint64_t r = bits(), exponent = uint64_t(1023 + low + below(high - low));
    uint64_t b = (((r & fraction) | set) & 0x800fffffffffffffu) | exponent << 52;
    double x;
    memcpy(&x, &b, sizeof x);
    return x;
  }

 private:
  uint64_t state_;
};

// ---- what depends on the rule or the format, as tables
// ----------------------------------------------------------------

// Each reaches what another does not: both kinds of decay, maximize, averages told from their far end, eps = 0.
constexpr int kRecipes = 5;
constexpr double kLr[kRecipes] = {1e-3, 1e-2, 0.3, 1.0, 1e-4};
template <class Hyper>
constexpr Hyper kHyper[kRecipes] = {};
template <>
constexpr host::RMSpropHyper kHyper<host::RMSpropHyper>[kRecipes] = {{0.99, 1e-8, 0, 0.9, 0},
                                                                     {0.9, 1e-6, 0.01, 0, 1},
                                                                     {0.3, 1e-8, 0, 0.3, 0},
                                                                     {0, 0, 0, 0.5, 0},
                                                                     {0.999, 1e-8, 0.1, 0.99, 0}};
template <>
constexpr host::AdamHyper kHyper<host::AdamHyper>[kRecipes] = {{0.9, 0.999, 1e-8, 0, 0, 0, 1},
                                                               {0.9, 0.999, 1e-8, 0.01, 1, 0, 1},
                                                               {0.3, 0.95, 1e-8, 0.1, 0, 1, 1},
                                                               {0, 0, 0, 0, 0, 0, 0},
                                                               {0.95, 0.4, 1e-6, 0.1, 1, 1, 0}};

template <class Rule>
std::vector<char> prepare(double t) {
  std::vector<char> made(kRecipes * sizeof(Rule));
  for (int i = 0; i < kRecipes; ++i) {
    Rule rule = Rule::prepare(kHyper<typename Rule::Hyper>[i], kLr[i], t);
    memcpy(made.data() + i * sizeof rule, &rule, sizeof rule);
  }
  return made;
}

struct RuleFacts {
  const char* name;
  int states;
  std::vector<char> (*prepare[2])(double t);
};
#define ROW(R, name) {name, host::R<float>::states, {prepare<host::R<float>>, prepare<host::R<double>>}},
const RuleFacts kRuleFacts[kRules] = {ADAMFUSED_RULES(ROW)};
#undef ROW

template <class Format>
void put(void* to, double x) {
  typename Format::Rest rest = Format::put(x);
  memcpy(to, &rest, sizeof rest);
}
template <class Format>
bool is_nan(const void* from) {
  typename Format::Rest rest;
  memcpy(&rest, from, sizeof rest);
  auto x = Format::get(rest);
  return x != x;
}

struct FormatFacts {
  const char* name;
  size_t size;
  void (*put)(void*, double);
  bool (*is_nan)(const void*);
};
#define ROW(F, ...) {#F, sizeof(host::F::Rest), put<host::F>, is_nan<host::F>},
const FormatFacts kFormatFacts[kFormats] = {ADAMFUSED_FORMATS(ROW)};
#undef ROW
const FormatFacts& facts(FormatId f) { return kFormatFacts[int(f)]; }

// ---- the tensors of one job
// -------------------------------------------------------------------------------------------

struct alignas(64) Line {
  uint8_t bytes[64];
};
using Memory = std::vector<Line>;
uint8_t* bytes(Memory& memory) { return memory[0].bytes; }
size_t size(const Memory& memory) { return memory.size() * sizeof(Line); }

void draw(Random& random, bool is_state, const FormatFacts& format, uint8_t* to) {
  static const double special[] = {0,       -0.0,    1,     0x1p-149, 0x1.8p-130, 0x1p-1074,
                                   0x1p-24, 0x1p-25, 65504, 65520,    HUGE_VAL,   NAN};
  uint64_t raw = random.bits();
  double x;
  switch (random.below(32)) {
    case 0:
      memcpy(to, &raw, format.size);
      return;  // anything at all
    case 1:
      x = special[raw % (sizeof special / sizeof *special)];
      break;
    case 2:
      x = random.number(-24, 16, ~uint64_t(0) << 45, uint64_t(1) << 44);
      break;  // half way in BF16
    case 3:
      x = random.number(-24, 16, ~uint64_t(0) << 42, uint64_t(1) << 41);
      break;  // in F16
    case 4:
      x = random.number(-24, 16, ~uint64_t(0) << 29, uint64_t(1) << 28);
      break;  // in F32
    case 5:
    case 6:
    case 7:
    case 8:
    case 9:
    case 10:
      x = random.number(-100, 100);
      break;
    default:
      x = random.number(-12, 4);
  }
  if (is_state && random.below(32) != 0) x = fabs(x);  // a negative second moment is soon NaN
  format.put(to, x);
}

struct Batch {
  RuleId rule;
  bool in_double;
  int parts;
  std::vector<Span> spans;  // `data` holds offsets
  std::vector<int64_t> first_tile{0};
  size_t size = 0;

  Batch(RuleId rule, FormatId p, FormatId g, FormatId state, Random& random)
      : rule(rule), in_double(p == FormatId::F64), parts(kState + kRuleFacts[int(rule)].states) {
    for (int n = 0; n <= 70; ++n) add(n, p, g, state, random);
    for (int n : {1023, 1024, 1025, 2049, 5000}) add(n, p, g, state, random);
  }
  void add(int64_t n, FormatId p, FormatId g, FormatId state, Random& random) {
    Span span{};
    span.numel = n, span.recipe = random.below(kRecipes);
    span.format[kParam] = p, span.format[kGrad] = g;
    for (int k = kState; k < parts; ++k) span.format[k] = random.below(4) ? state : FormatId(random.below(kFormats));
    for (int k = 0; k < parts; ++k) {
      size_t width = facts(span.format[k]).size;
      size += 64;  // guard bytes, more of them where the next part is aligned to a cache line
      size = (size + 63) / 64 * 64 + (random.below(4) ? random.below(int(64 / width)) * width : 0);
      span.data[k] = reinterpret_cast<void*>(size);
      size += size_t(n) * width;
    }
    spans.push_back(span);
    first_tile.push_back(first_tile.back() + (n + kTile - 1) / kTile);
  }
  size_t at(const Span& span, int k) const { return reinterpret_cast<size_t>(span.data[k]); }

  void fill(Random& random, Memory& memory, int from, int to) const {
    for (const Span& span : spans)
      for (int k = from; k < to; ++k) {
        const FormatFacts& format = facts(span.format[k]);
        for (int64_t i = 0; i < span.numel; ++i)
          draw(random, k >= kState, format, bytes(memory) + at(span, k) + size_t(i) * format.size);
      }
  }
  void run(const Isa& isa, Memory& memory, double t, int64_t cut) const {
    std::vector<Span> placed = spans;
    for (Span& span : placed)
      for (int k = 0; k < parts; ++k) span.data[k] = bytes(memory) + at(span, k);
    std::vector<char> rules = kRuleFacts[int(rule)].prepare[in_double](t);
    Job job{};
    job.rule = rule, job.in_double = in_double;
    job.spans = placed.data(), job.count = int64_t(placed.size());
    job.rules = rules.data(), job.first_tile = first_tile.data();
    isa.table[int(rule)][in_double](job, 0, cut);
    isa.table[int(rule)][in_double](job, cut, first_tile.back());
  }
};

struct Tally {
  const Isa* isa;
  Memory memory;
  long long compared, different;
  uint64_t digest;  // of all numbers written: the same program must give the same digest on every machine
};

// What an instruction set left: each number that is written against `expected`, and all else, gradients and guard
// bytes, against what it was.
void compare(const Batch& batch, int step, Memory& before, Memory& expected, Tally& tally) {
  uint8_t *was = bytes(before), *want = bytes(expected), *got = bytes(tally.memory);
  auto report = [&](const char* what, const Span& span, int k, int64_t i) {
    if (++tally.different > 10) return;
    printf("%s: %s %s: %s part %d of", tally.isa->name, what, kRuleFacts[int(batch.rule)].name,
           facts(span.format[k]).name, k);
    for (int j = 0; j < batch.parts; ++j) printf(" %s", facts(span.format[j]).name);
    printf(", %lld numbers, recipe %d, step %d", (long long)span.numel, span.recipe, step);
    uint64_t a = 0, b = 0;
    size_t width = facts(span.format[k]).size, place = batch.at(span, k) + size_t(i) * width;
    if (i >= 0) memcpy(&a, got + place, width), memcpy(&b, want + place, width);
    if (i >= 0) printf(": [%lld] 0x%llx, not 0x%llx", (long long)i, (unsigned long long)a, (unsigned long long)b);
    printf("\n");
  };
  size_t place = 0;
  for (const Span& span : batch.spans)
    for (int k = 0; k < batch.parts; ++k) {
      if (k == kGrad) continue;
      const FormatFacts& format = facts(span.format[k]);
      size_t begin = batch.at(span, k);
      if (memcmp(was + place, got + place, begin - place) != 0) report("wrote outside, before", span, k, -1);
      for (int64_t i = 0; i < span.numel; ++i) {
        uint64_t a = 0, b = 0;
        place = begin + size_t(i) * format.size;
        memcpy(&a, got + place, format.size), memcpy(&b, want + place, format.size);
        bool nan = format.is_nan(got + place);
        if (nan ? !format.is_nan(want + place) : a != b) report("differs,", span, k, i);
        tally.digest = (tally.digest ^ (nan ? ~uint64_t(0) : a)) * 0x100000001b3u;
      }
      tally.compared += span.numel;
      place = begin + size_t(span.numel) * format.size;
    }
  const Span& last = batch.spans.back();
  if (memcmp(was + place, got + place, size(before) - place) != 0)
    report("wrote outside, after", last, batch.parts - 1, -1);
}

void compare_batch(const Batch& batch, Random& random, bool flip, std::vector<Tally>& tallies) {
  Memory start(batch.size / sizeof(Line) + 2);
  memset(bytes(start), 0xa5, size(start));
  batch.fill(random, start, kParam, batch.parts);
  for (Tally& tally : tallies) {
    tally.memory = start;
    if (flip && &tally != &tallies[0]) bytes(tally.memory)[batch.at(batch.spans.back(), kParam)] ^= 1;
  }
  for (int step = 1; step <= 3; ++step) {
    batch.fill(random, start, kGrad, kGrad + 1);
    int64_t cut = random.below(int(batch.first_tile.back()));
    for (Tally& tally : tallies) {
      for (const Span& span : batch.spans) {
        size_t at = batch.at(span, kGrad);
        memcpy(bytes(tally.memory) + at, bytes(start) + at, size_t(span.numel) * facts(span.format[kGrad]).size);
      }
      batch.run(*tally.isa, tally.memory, step, cut);
      compare(batch, step, start, tallies[0].memory, tally);
    }
  }
}

int compare_all(int argc, char** argv) {
  int every = 1, number = 0, failed = 0;
  bool flip = false;
  std::vector<const char*> wanted;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--break") == 0)
      flip = true;
    else if (strcmp(argv[i], "--every") == 0 && i + 1 < argc && atoi(argv[i + 1]) > 0)
      every = atoi(argv[++i]);
    else if (argv[i][0] != '-')
      wanted.push_back(argv[i]);
    else
      return fprintf(stderr, "usage: compare_isas [--every N] [--break] [ISA...]\n"), 2;
  }
  std::vector<Tally> tallies;
  for (const Isa& isa : kIsaTable)
    if (isa.runs_here()) tallies.push_back({&isa, {}, 0, 0, 0xcbf29ce484222325u});
  for (int rule = 0; rule < kRules; ++rule)
    for (int formats = 0; formats < kFormats * kFormats * kFormats; ++formats) {
      Random random{uint64_t(number)};
      FormatId p{uint8_t(formats % kFormats)}, g{uint8_t(formats / kFormats % kFormats)};
      if (number++ % every != 0) continue;
      Batch batch(RuleId(rule), p, g, FormatId(formats / kFormats / kFormats), random);
      compare_batch(batch, random, flip && number == 1, tallies);
    }
  for (const Tally& tally : tallies) {
    printf("%s: %lld comparisons, %lld differences, digest %016llx%s\n", tally.isa->name, tally.compared,
           tally.different, (unsigned long long)tally.digest,
           &tally == &tallies[0] ? " (what the others are compared with)" : "");
    failed |= tally.different != 0;
  }
  for (const char* name : wanted) {
    bool ran = false;
    for (const Tally& tally : tallies) ran |= strcmp(tally.isa->name, name) == 0;
    if (!ran) printf("%s: does not run here\n", name);
    failed |= !ran;
  }
  return failed;
}

}  // namespace

int main(int argc, char** argv) {
  int status = compare_all(argc, argv);
  if (getpid() != 1) return status;
  printf("exit status %d\n", status);  // there is no one to return it to
  fflush(stdout), tcdrain(1);
  reboot(RB_POWER_OFF);
}
