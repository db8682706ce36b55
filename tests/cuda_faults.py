"""Faults for the CUDA kernels, by name: the file, what stands there once, and what takes its place."""

from __future__ import annotations

STEP, PACKED = "cuda/step.cuh", "cuda/packed.cuh"

FAULTS = {
    "the tensor before": (
        STEP,
        "if (job.first_tile[middle] <= tile)",
        "if (job.first_tile[middle] < tile)",
    ),
    "never the last tensor": (
        STEP,
        "high = job.count;",
        "high = job.count > 1 ? job.count - 1 : 1;",
    ),
    "tiles counted from the launch's first": (
        STEP,
        "int64_t(tile - job.first_tile[s]) *",
        "int64_t(tile) *",
    ),
    "an offset in 32 bits": (
        STEP,
        "const int64_t start = int64_t(tile - job.first_tile[s]) *",
        "const int start = int(tile - job.first_tile[s]) *",
    ),
    "one tile a block": (STEP, "tile += gridDim.x", "tile += job.first_tile[job.count]"),
    "no barrier before the rule is made": (
        STEP,
        "__syncthreads();  // the tile before",
        "// the tile before",
    ),
    "no barrier after the rule is made": (
        STEP,
        "entry, job.factor);\n      __syncthreads();",
        "entry, job.factor);",
    ),
    "a barrier for some": (
        STEP,
        "if (made_here) {",
        "if (made_here && threadIdx.x < 32) {",
    ),
    "counts stay": (STEP, "*entry.step += 1.0f", "*entry.step += 0.0f"),
    "one count stays": (
        STEP,
        "s >= job.count || job.entry",
        "s >= job.count - 1 || job.entry",
    ),
    "counts on the device past the first block stay": (
        STEP,
        "int(blockIdx.x * blockDim.x +",
        "int(",
    ),
    "a double learning rate read as float": (STEP, "recipe.lr_is_double ?", "false ?"),
    "a place is kept for the next launch": (
        "cuda/run.cuh",
        "for (int32_t i : used) place[size_t(i)] = -1;",
        "",
    ),
    "a recipe's place is kept": (
        "cuda/run.cuh",
        "for (int32_t i : recipe_used) recipe_place[size_t(i)] = -1;",
        "",
    ),
    "rules and recipes share places": (
        "cuda/run.cuh",
        "(made_there ? recipe_place : place)",
        "(place)",
    ),
    "the last tensor says whether counts move": (
        "cuda/run.cuh",
        "advance |= span.step != nullptr",
        "advance = span.step != nullptr",
    ),
    "an empty tensor's count stays": (
        "cuda/run.cuh",
        "span.numel == 0 && span.step == nullptr",
        "span.numel == 0",
    ),
    "the first tensor's alignment": (
        "cuda/run.cuh",
        "entry.aligned = span.aligned",
        "entry.aligned = job.spans[0].aligned",
    ),
    # ---- the average of the weights, copies, factor, overflows
    "the average is of the weights before": (
        "rules.h",
        "apply<Rule<T>>(*this, p, g, a, b);\n    e = averaged(e, p);",
        "e = averaged(e, p);\n    apply<Rule<T>>(*this, p, g, a, b);",
    ),
    "the average begins with what was there": (
        "rules.h",
        "now.t == 1 ? 0.0 : now.ema_decay",
        "now.ema_decay",
    ),
    "the average's decay is lost": (STEP, "recipe.ema_decay, carried}", "0.5, carried}"),
    "the factor is 1": (STEP, "factor != nullptr ? *factor : 1.0", "factor ? 1.0 : 1.0"),
    "the factor counts only with counts on the device": (
        STEP,
        "entry.step != nullptr || job.factor != nullptr",
        "entry.step != nullptr",
    ),
    "rules are packed where there is a factor": (
        "cuda/run.cuh",
        "span.step != nullptr || job.factor != nullptr",
        "span.step != nullptr",
    ),
    "the count on the host is 1": (STEP, ": recipe.t;", ": 1.0;"),
    "the count on the device is the host's": (
        STEP,
        "step != nullptr ? double(*entry.step) : recipe.t",
        "step != nullptr ? recipe.t : recipe.t",
    ),
    "tensors move in spite of an overflow": (STEP, "if (overflowed(job)) return;", ""),
    "counts move in spite of an overflow": (STEP, " || overflowed(job)) return;", ") return;"),
    "an overflow on two devices is none": (
        STEP,
        "*job.found_inf != 0.0f",
        "*job.found_inf == 1.0f",
    ),
    "any found_inf is an overflow": (
        STEP,
        "job.found_inf != nullptr && *job.found_inf != 0.0f",
        "job.found_inf != nullptr",
    ),
    # ---- where numbers lie
    "rows run over the end": (PACKED, "aligned && block + kBlock <= n", "aligned"),
    "aligned accesses to all": (
        PACKED,
        "aligned && block + kBlock",
        "(aligned || true) && block + kBlock",
    ),
    "the last number is left out": (PACKED, "first + j * step() < n", "first + j * step() + 1 < n"),
    "one number past the end": (PACKED, "first + j * step() < n", "first + j * step() <= n"),
    "neighbours have the same numbers": (PACKED, "block + i % kBlock / E;", "block;"),
    "rows read ahead": (
        PACKED,
        "load_bytes<E * sizeof(Rest)>(from, word);",
        "load_bytes<E * sizeof(Rest)>(from + E, word), load_bytes<E * sizeof(Rest)>(from, word);",
    ),
    "what is past the end is read": (
        PACKED,
        "at.has(j) ? from[j * Places<E>::kNeighbours] : Rest(0)",
        "from[j * Places<E>::kNeighbours]",
    ),
    "wide numbers in a row": (PACKED, "if (at.has(j)) to[j * at.step()]", "if (at.has(j)) to[j]"),
    "the round leaves some out": (STEP, "i += kThreads * E)", "i += 2 * kThreads * E)"),
    "warps split": (STEP, "i / warp * warp < n", "i + 0 * warp < n"),
    "whole tiles only": ("cuda/run.cuh", "(span.numel + tile - 1) / tile", "span.numel / tile"),
    "tiles of twice the size": ("cuda/run.cuh", "tile = tile_size<E>", "tile = tile_size<E> * 2"),
    # ---- parts and copies
    "the gradient is written": (STEP, "if constexpr (k.value != kGrad)", "if constexpr (true)"),
    "a state stays": (STEP, "(k.value != kGrad)", "(k.value != kGrad && k.value != kState + 1)"),
    "the average stays": (
        STEP,
        "(k.value != kGrad)",
        "(k.value != kGrad && k.value != kState + 2)",
    ),
    "a copy of a state": (STEP, "entry.format[parts], x.p,", "entry.format[parts], x.s[0],"),
    "a copy lacks the tail": (
        STEP,
        "if (entry.data[parts] != nullptr) {",
        "if (entry.data[parts] != nullptr && at.in_a_row) {",
    ),
    "a copy in the parameter's format": (
        STEP,
        "kCopy>(entry.format[parts], x.p",
        "kCopy>(entry.format[kParam], x.p",
    ),
    "a copy that is not there": (STEP, "if (entry.data[parts] != nullptr) {", "if (true) {"),
    # ---- formats that are not plain
    "the last format says what a job has": (
        "cuda/run.cuh",
        "stored = stored || !is_plain<F>",
        "stored = !is_plain<F>",
    ),
    "nobody asks the neighbours": (
        PACKED,
        "mine = larger(mine, __shfl_xor_sync(0xffffffffu, mine, other));",
        "(void)other;",
    ),
    "half of the neighbours are asked": (
        PACKED,
        "other < Places<E>::kNeighbours",
        "other < Places<E>::kNeighbours / 2",
    ),
    "another block's neighbours are asked": (
        PACKED,
        "other < Places<E>::kNeighbours",
        "other <= Places<E>::kNeighbours",
    ),
    "infinity counts for the scale": (
        PACKED,
        "if (is_finite(magnitude))",
        "if (true)",
    ),
    "negative numbers count most": (
        PACKED,
        "bits_of(float(x[j])) & kMagnitude",
        "bits_of(float(x[j]))",
    ),
    "a block is not marked": (
        PACKED,
        "largest_of_block<E>(special) == 0",
        "true",
    ),
    "what is past the end counts": (
        PACKED,
        "magnitude = at.has(j) ? bits_of(float(x[j])) & kMagnitude : 0",
        "magnitude = bits_of(float(x[j])) & kMagnitude",
    ),
    "each thread marks for itself": (
        PACKED,
        "largest_of_block<E>(special) == 0",
        "special == 0",
    ),
    "codes without their sign": (
        PACKED,
        "decode(uint32_t(rest[j])",
        "decode(uint32_t(rest[j] & 0x7f)",
    ),
    "dither stands still": (
        PACKED,
        "key_of_dither(from.key, from.t)",
        "key_of_dither(from.key, 0)",
    ),
    "all tensors dither alike": (
        PACKED,
        "key_of_dither(from.key, from.t)",
        "key_of_dither(0, from.t)",
    ),
    "a shard dithers like the first": (
        PACKED,
        "dither_at(from.first + phase_of(at.index(j)), key)",
        "dither_at(phase_of(at.index(j)), key)",
    ),
    "each number of a block has its own dither": (
        PACKED,
        "dither_at(from.first + phase_of(at.index(j)), key)",
        "dither_at(from.first + at.index(j), key)",
    ),
    "every tile has the same words": (
        PACKED,
        "return uint32_t(tile) + uint32_t(",
        "return uint32_t(",
    ),
    "chance without the step": (
        PACKED,
        "key_of(from.key, from.t, slot)",
        "key_of(from.key, 0, slot)",
    ),
    "chance without the slot": (
        PACKED,
        "key_of(from.key, from.t, slot)",
        "key_of(from.key, from.t, 0)",
    ),
    "a shard's chance is the first's": (
        PACKED,
        "word = word_of(counter_at(from.first + at.index(j), key))",
        "word = word_of(counter_at(at.index(j), key))",
    ),
    "the host's step decides by chance": (
        STEP,
        "random.t = uint32_t(*entry.step)",
        "random.t = entry.random.t",
    ),
    "the upper half is not upper": (PACKED, "uint32_t(rest[j]) << 16,", "uint32_t(rest[j]),"),
    "the lower half has no sign": (
        PACKED,
        "uint32_t(beside[j])));",
        "uint32_t(beside[j]) & 0xffu));",
    ),
    "the master stays": (
        STEP,
        "master.template store<decltype(beside)>(entry.master, at);",
        "(void)beside;",
    ),
    "the master is not read": (
        STEP,
        "master.template load<decltype(beside)>(entry.master, at);",
        "(void)beside, memset(&master, 0, sizeof master);",
    ),
    "another block's scale": (STEP, "= scales[at.block()];", "= scales[at.block() / 2];"),
    "a scale past the end is read": (STEP, "scales != nullptr && at.has(0)", "scales != nullptr"),
    "a scale past the end is written": (
        PACKED,
        "first % kBlock == 0 && has(0)",
        "first % kBlock == 0",
    ),
    "scales stay": (STEP, "scales != nullptr && at.leads()", "false"),
    "a scale of the first state": (
        STEP,
        "scales[at.block()] = scale[k.value]",
        "scales[at.block()] = scale[kState]",
    ),
    "scales by another tile": (PACKED, "return begin() / kBlock;", "return first / kBlock;"),
}

FAULTS_IN_WHAT_IS_CARRIED = {
    "it stays": (STEP, "*entry.carried = float(", "(void)float("),
    "it moves before the count": (
        STEP,
        "hyper, double(*entry.step),",
        "hyper, double(*entry.step) - 1.0,",
    ),
    "it moves by another group's numbers": (
        STEP,
        "hyper_of<typename Rule::Hyper>(job.ready[entry.recipe].recipe.hyper)",
        "hyper_of<typename Rule::Hyper>(job.ready[0].recipe.hyper)",
    ),
    "the host's is taken": (STEP, "carried = double(*entry.carried);", "(void)0;"),
    "the first tensor's is taken": (
        "cuda/run.cuh",
        "entry.carried = span.carried;",
        "entry.carried = job.spans[0].carried;",
    ),
}

FAULTS_IN_SUMS = {
    "neighbours are joined first": (
        "cuda/sum.cu",
        "unsigned half = kLanes / 2; half > 0; half /= 2",
        "unsigned half = 1; half < kLanes; half *= 2",
    ),
    "numbers of a lane in another order": (
        "cuda/sum.cu",
        "x[j] = from[i + j * kLanes];",
        "x[j] = from[i + (7 - j) * kLanes];",
    ),
    "the last numbers are left out": (
        "cuda/sum.cu",
        "for (; i < n; i += kLanes)",
        "for (; i + kLanes <= n; i += kLanes)",
    ),
    "one number too many": ("cuda/sum.cu", "i + 7 * kLanes < n;", "i + 7 * kLanes <= n;"),
    "whole chunks only": (
        "cuda/sum.cu",
        "tensor.numel - start < kChunk ? tensor.numel - start : kChunk",
        "kChunk",
    ),
    "chunks without their last number": (
        "cuda/sum.cu",
        "tensor.numel - start : kChunk)",
        "tensor.numel - start : kChunk - 1)",
    ),
    "the last chunk is left out": ("sum.h", "(numel + kChunk - 1) / kChunk", "numel / kChunk"),
    "sums of the tensor before": ("cuda/sum.cu", "[middle] <= chunk", "[middle] < chunk"),
    "never the last tensor of sums": ("cuda/sum.cu", "high = job.count;", "high = job.count - 1;"),
    "chunks counted from the launch's first": (
        "cuda/sum.cu",
        "int64_t(chunk - job.first_chunk[t]) *",
        "int64_t(chunk) *",
    ),
    "an offset of numbers in 32 bits": (
        "cuda/sum.cu",
        "const int64_t start = int64_t(chunk - job.first_chunk[t]) *",
        "const int start = int(chunk - job.first_chunk[t]) *",
    ),
    "one chunk a warp": (
        "cuda/sum.cu",
        "chunk += warps",
        "chunk += warps + job.first_chunk[job.count]",
    ),
    "the second launch writes over the first": ("cuda/sum.cu", "arguments.sums += *first;", ""),
    "launches are not cut": ("cuda/sum.cu", "arguments.count == SumArguments::entries ||", ""),
    "sums are squared again": (
        "cuda/sum.cu",
        "SumOf what = next(job.what);",
        "SumOf what = job.what;",
    ),
    "sums over sums": ("cuda/sum.cu", "    sums += chunks;\n", ""),
    "two levels of sums": (
        "cuda/sum.cu",
        "chunks > 1 && error",
        "chunks > 1 && sums == job.sums && error",
    ),
    "a NaN that comes later is lost": ("rules.h", "((b > a) | (b != b)) ? b : a", "b > a ? b : a"),
    "a NaN that came is lost": ("rules.h", "((b > a) | (b != b)) ? b : a", "a > b ? a : b"),
    "the largest is not the negative one": ("sum.h", "return x < 0.0 ? -x : x;", "return x;"),
    "the largest are added": (
        "sum.h",
        "if constexpr (what == SumOf::Largest) return larger(a, b);",
        "",
    ),
    "squares are rounded to float": (
        "cuda/sum.cu",
        "sum = Sum::join(sum, Sum::of(double(Format::get(x[j]))));",
        "sum = Sum::join(sum, double(float(Sum::of(double(Format::get(x[j]))))));",
    ),
}
