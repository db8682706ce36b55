// Runs every instruction set's kernels on copies of the same tensors and compares what they leave, bit for bit, with
// what the scalar kernels leave; a NaN need only be a NaN. (Of the scalar kernels themselves this shows no more than
// that they write nowhere else.) It needs neither torch nor Python and can be the only process of a machine, process 1,
// so that it also runs in an emulator of a processor that is not at hand: run.sh.
//
//   compare_isas [--every=N] [--break] [ISA...]
//     --every=N  only every Nth combination of rule and formats
//     --break    flips one bit of each batch that all but the scalar kernels get: differences must be found
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
constexpr double kSGD[kRecipes][5] = {
    {0, 0.9, 0, 0, 0}, {0.01, 0.9, 0.3, 0, 1}, {0.1, 0.3, 0, 1, 0}, {0, 0.5, 0, 1, 0}, {0.1, 0.99, 0, 1, 1},
};
constexpr double kAdagrad[kRecipes][4] = {
    {0, 1e-10, 0, 0}, {0.1, 1e-6, 0.01, 1}, {0, 0, 0, 0}, {1, 1e-8, 0, 0}, {0.01, 1e-10, 0.1, 0},
};
constexpr double kAdadelta[kRecipes][4] = {
    {0.9, 1e-6, 0, 0}, {0.95, 1e-3, 0.01, 1}, {0.3, 1e-6, 0, 0}, {1, 1e-6, 0, 0}, {0, 1e-6, 0.1, 0},
};
constexpr double kLion[kRecipes][4] = {
    {0.9, 0.99, 0, 0}, {0.95, 0.98, 0.1, 1}, {0.3, 0.4, 0, 0}, {0, 0, 1, 0}, {0.3, 0.99, 0.1, 0},
};
constexpr double kNAdam[kRecipes][7] = {
    {0.9, 0.999, 1e-8, 0, 0, 0, 0.9998},  {0.9, 0.999, 1e-8, 0.01, 1, 0, 0.996},
    {0.3, 0.95, 1e-8, 0.1, 0, 1, 1},      {0, 0, 0, 0, 0, 0, 0.9},
    {0.95, 0.4, 1e-6, 0.1, 1, 1, 0.9998},
};
constexpr double kRMSprop[kRecipes][5] = {
    {0.99, 1e-8, 0, 0.9, 0}, {0.9, 1e-6, 0.01, 0, 1},     {0.3, 1e-8, 0, 0.3, 0},
    {0, 0, 0, 0.5, 0},       {0.999, 1e-8, 0.1, 0.99, 0},
};
constexpr double kAdam[kRecipes][7] = {
    {0.9, 0.999, 1e-8, 0, 0, 0, 1}, {0.9, 0.999, 1e-8, 0.01, 1, 0, 1}, {0.3, 0.95, 1e-8, 0.1, 0, 1, 1},
    {0, 0, 0, 0, 0, 0, 0},          {0.95, 0.4, 1e-6, 0.1, 1, 1, 0},
};
const void* recipe(const host::SGDHyper&, int i) { return kSGD[i]; }
const void* recipe(const host::AdagradHyper&, int i) { return kAdagrad[i]; }
const void* recipe(const host::AdadeltaHyper&, int i) { return kAdadelta[i]; }
const void* recipe(const host::LionHyper&, int i) { return kLion[i]; }
const void* recipe(const host::NAdamHyper&, int i) { return kNAdam[i]; }
const void* recipe(const host::RAdamHyper&, int i) { return kAdam[i]; }
const void* recipe(const host::RMSpropHyper&, int i) { return kRMSprop[i]; }
const void* recipe(const host::AdamHyper&, int i) { return kAdam[i]; }

template <class Rule>
std::vector<char> prepare(int step) {
  std::vector<char> made(kRecipes * sizeof(Rule));
  for (int i = 0; i < kRecipes; ++i) {
    typename Rule::Hyper hyper;
    memcpy(&hyper, recipe(hyper, i), sizeof hyper);
    Rule rule = Rule::prepare(hyper, {kLr[i], double(step), kFactor[i], kEmaDecay[i], 0.7});
    memcpy(&made[size_t(i) * sizeof rule], &rule, sizeof rule);
  }
  return made;
}

// What one number of a slot is: a number by itself, or raw bits.
struct Kind {
  size_t size = 0;                       // 0: there is none
  void (*put)(void*, double) = nullptr;  // null: raw bits
  uint64_t (*bits)(const void*) = nullptr;
};

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

template <class Format>
Kind number() {
  return {sizeof(typename Format::Rest), put<Format>, bits<Format>};
}

// Of codes: zero, or the power of two of a number, in the range of scales.
void put_scale(void* to, double x) {
  const uint32_t power = host::bits_of(float(x)) & host::kInfinity;
  const uint32_t some = host::larger(host::smaller(power, host::kMostScale), host::kLeastScale);
  memcpy(to, power == 0 ? &power : &some, sizeof power);
}
Kind scale() { return {sizeof(float), put_scale, bits<host::F32>}; }

template <class Rest>
Kind raw() {
  return {sizeof(Rest), nullptr, [](const void* from) { return uint64_t(*static_cast<const Rest*>(from)); }};
}

const struct RuleFacts {
  const char* name;
  int states;
  uint32_t never_negative;
  std::vector<char> (*prepare[2])(int step);
} kRuleFacts[kRules][2] = {
#define ROW(R, name)                                      \
  {{name,                                                 \
    host::R<float>::states,                               \
    host::R<float>::never_negative,                       \
    {prepare<host::R<float>>, prepare<host::R<double>>}}, \
   {name " averaged",                                     \
    host::R<float>::states + 1,                           \
    host::R<float>::never_negative,                       \
    {prepare<host::Averaged<host::R, float>>, prepare<host::Averaged<host::R, double>>}}},
    ADAMFUSED_RULES(ROW)
#undef ROW
};

const struct FormatFacts {
  const char* name;
  Kind kind, beside;
} kFormatFacts[] = {
    {"F32", number<host::F32>(), {}},
    {"F64", number<host::F64>(), {}},
    {"BF16", number<host::BF16>(), {}},
    {"F16", number<host::F16>(), {}},
    {"BF16AtRandom", number<host::BF16>(), {}},
    {"F16AtRandom", number<host::F16>(), {}},
    {"Split16", number<host::BF16>(), raw<int16_t>()},
    {"Split8", number<host::BF16>(), raw<int8_t>()},
    {"MasterBF16", number<host::BF16>(), number<host::F32>()},
    {"MasterF16", number<host::F16>(), number<host::F32>()},
    {"SignedCode", raw<uint8_t>(), scale()},
    {"UnsignedCode", raw<uint8_t>(), scale()},
};
static_assert(sizeof kFormatFacts / sizeof *kFormatFacts == kFormats,
              "every format, in the order of ADAMFUSED_FORMATS");
constexpr int kNumberFormats = 4, kParamFormats = int(FormatId::SignedCode);

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

void draw(bool is_state, const Kind& kind_of_number, uint8_t* to) {
  static const double special[16] = {0,         -0.0,    0,       1,     0x1p-149, 0x1.8p-130, 0x1p-1074, 0x1p-130,
                                     0x1.8p-15, 0x1p-24, 0x1p-25, 65504, 65520,    1e30,       HUGE_VAL,  NAN};
  static const int rare[4][3] = {{-24, 16, 7}, {-24, 16, 10}, {-24, 16, 23}, {-100, 100, 52}};  // ties; 1e-30 to 1e30
  const int kind = random_below(32), *range = rare[kind % 4];
  const uint64_t raw = random_bits();
  if (kind == 31 || !kind_of_number.put) return (void)memcpy(to, &raw, kind_of_number.size);  // any bits at all
  double x = kind < 12 ? random_number(range[0], range[1], range[2]) : random_number(-12, 4, 52);
  if (kind == 30) x = special[raw % 16];
  kind_of_number.put(to, is_state && random_below(32) ? fabs(x) : x);  // of a negative second moment all becomes NaN
}

// A float that a 16-bit number was rounded from, or, now and then, another.
void draw_master(FormatId format, const uint8_t* rounded, uint8_t* to) {
  uint16_t h;
  memcpy(&h, rounded, sizeof h);
  uint32_t b = host::bits_of(format == FormatId::MasterF16 ? host::F16::get(h) : host::BF16::get(h));
  if (format == FormatId::MasterBF16) b += uint32_t(random_below(0x10000)) - 0x8000u;
  if (random_below(8) == 0) b += 0x20000;
  memcpy(to, &b, sizeof b);
}

struct alignas(64) Line : std::array<uint8_t, 64> {};
using Memory = std::vector<Line>;
uint8_t* at(Memory& memory, size_t place) { return memory[0].data() + place; }

// One tensor in the memory of an instruction set; it says where in that memory instead of at which address.
struct Tensor {
  Span span;
  Kind kind[kSlots];
  size_t begin[kSlots], end[kSlots];

  bool has(int k) const { return kind[k].size != 0; }
  std::vector<int> order() const {  // the slots as they lie in memory
    std::vector<int> slots;
    for (int k = 0; k < kSlots; ++k)
      if (has(k)) slots.push_back(k);
    std::sort(slots.begin(), slots.end(), [this](int a, int b) { return begin[a] < begin[b]; });
    return slots;
  }
};

struct Batch {
  int rule, states;
  bool averaged, in_double;
  std::vector<Tensor> tensors;
  std::vector<int64_t> first_tile{0};
  size_t size = 0;

  // state: of all but some; SignedCode also stands for the codes of what is never negative.
  Batch(int rule, bool averaged, FormatId p, FormatId g, FormatId state)
      : rule(rule), states(kRuleFacts[rule][averaged].states), averaged(averaged), in_double(p == FormatId::F64) {
    for (int n = 0; n <= 70; ++n) add(n, p, g, state);
    for (int n : {127, 128, 129, 1023, 1024, 1025, 2049, 5000}) add(n, p, g, state);
    size += 64;
  }
  void add(int64_t n, FormatId p, FormatId g, FormatId state) {
    Tensor t{};
    t.span.numel = n, t.span.recipe = random_below(kRecipes);
    t.span.key = uint32_t(random_bits()), t.span.first = uint32_t(random_bits());
    const bool copied = random_below(2) != 0;
    for (int k = 0; k < kParts; ++k) {
      const bool is_state = k >= kState && k < kState + states;
      if (k >= kState && !is_state && !(k == kCopy && copied)) continue;
      FormatId format = k == kParam ? p : k == kGrad ? g : FormatId(random_below(kNumberFormats));
      if (is_state && random_below(8)) format = state;
      if (is_state && format == FormatId::SignedCode && kRuleFacts[rule][averaged].never_negative >> (k - kState) & 1)
        format = FormatId::UnsignedCode;
      const FormatFacts& facts = kFormatFacts[int(format)];
      t.span.format[k] = format;
      place(t, k, facts.kind, n);
      if (k == kParam) place(t, kMaster, facts.beside, n);
      if (is_state) place(t, kScale + k - kState, facts.beside, (n + host::kBlock - 1) / host::kBlock);
    }
    tensors.push_back(t);
    first_tile.push_back(first_tile.back() + (n + kTile - 1) / kTile);
  }
  void place(Tensor& t, int k, const Kind& kind, int64_t n) {
    if (kind.size == 0) return;
    const int width = int(kind.size), shift = random_below(4) ? random_below(64 / width) * width : 0;
    t.kind[k] = kind;
    t.begin[k] = (size + 127) / 64 * 64 + size_t(shift);  // after guard bytes; 3 in 4 not at the start of a line
    size = t.end[k] = t.begin[k] + size_t(n) * size_t(width);
  }
  void fill(Memory& memory, int from, int to) const {
    for (const Tensor& t : tensors)
      for (int k = from; k < to; ++k)
        for (size_t i = t.begin[k]; i < t.end[k]; i += t.kind[k].size) {
          uint8_t* number = at(memory, i);
          if (k == kMaster && t.kind[k].put)
            draw_master(t.span.format[kParam], at(memory, t.begin[kParam] + (i - t.begin[k]) / 2), number);
          else if (k >= kScale)
            t.kind[k].put(number, fabs(random_number(-40, 10, 52)));
          else
            draw(k >= kState && k < kCopy, t.kind[k], number);
        }
  }
  void run(const Isa& isa, Memory& memory, int step, int64_t cut) const {
    std::vector<Span> spans;
    for (const Tensor& t : tensors) {
      spans.push_back(t.span);
      spans.back().t = uint32_t(step);
      for (int k = 0; k < kSlots; ++k) spans.back().data[k] = t.has(k) ? at(memory, t.begin[k]) : nullptr;
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
      for (int k : t.order()) {
        if (k == kGrad) continue;
        const Kind& kind = t.kind[k];
        if (memcmp(at(before, place), at(memory, place), t.begin[k] - place) != 0)
          report(batch, t, k, step, "wrote outside, before");
        for (place = t.begin[k]; place < t.end[k]; place += kind.size, ++compared) {
          uint64_t got = kind.bits(at(memory, place)), want = kind.bits(at(expected, place));
          if (got != want) report(batch, t, k, step, "differs at", (place - t.begin[k]) / kind.size, got, want);
          digest = (digest ^ got) * 0x100000001b3u + 1;
        }
      }
    if (memcmp(at(before, place), at(memory, place), batch.size - place) != 0)
      report(batch, batch.tensors.back(), kParam, step, "wrote outside, after");
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
    for (int k = 0; k < kParts; ++k)
      if (t.has(k)) printf(" %s", kFormatFacts[int(t.span.format[k])].name);
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
  const FormatId like_param[kParamFormats] = {FormatId::F32,  FormatId::F64, FormatId::BF16, FormatId::F16,
                                              FormatId::BF16, FormatId::F16, FormatId::BF16, FormatId::BF16,
                                              FormatId::BF16, FormatId::F16};
  const FormatId of_states[] = {FormatId::F32,          FormatId::F64,         FormatId::BF16,      FormatId::F16,
                                FormatId::BF16AtRandom, FormatId::F16AtRandom, FormatId::SignedCode};
  for (int rule = 0; rule < 2 * kRules; ++rule)
    for (int p = 0; p < kParamFormats; ++p)
      for (FormatId state : of_states) {
        if (number++ % std::max(every, 1) != 0) continue;
        seed = uint64_t(number);
        const FormatId g = random_below(3) ? like_param[p] : FormatId(random_below(kNumberFormats));
        compare_batch(Batch(rule / 2, rule % 2 != 0, FormatId(p), g, state), flip, tallies);
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
