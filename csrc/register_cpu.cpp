// The operators of the CPU library: tensors in, loops of the best instruction set, tensors out.
//
// Only the stable ABI of LibTorch is used, so that one binary serves torch 2.11 and newer. Shapes and
// dtypes are checked by the caller (mirror_opt/ops/), which leaves those of `attempt` to it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "stored.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 4096;      // elements for which a thread is worth waking
constexpr int64_t kSegment = 16384;   // elements whose gradients are added up in one go

// The instruction sets of this processor, the best first.
std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    sets.push_back(&avx2);
  }
#endif
  sets.push_back(&portable);
  return sets;
}

std::atomic<const InstructionSet*> active{supported().front()};

template <class T> const Kernels<T>& kernels();
template <> const Kernels<float>& kernels() { return active.load()->f32; }
template <> const Kernels<double>& kernels() { return active.load()->f64; }

template <class T> T* data(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }
// What is only read may be shared: asking for memory to write to would copy it first.
template <class T> const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
Map<T> make_map(const Tensor& u, const Tensor& gain, const Tensor& w, const Tensor& s,
                const Tensor& c) {
  return {read<T>(gain), read<T>(w), read<T>(s), read<T>(c), u.size(0), u.size(1), w.size(1),
          gain.size(0), static_cast<int>(w.size(0))};
}

template <class F> auto with_dtype(const Tensor& u, const F& f) {
  return u.scalar_type() == torch::headeronly::ScalarType::Double ? f(double{}) : f(float{});
}

Tensor forward(Tensor u, Tensor gain, Tensor w, Tensor s, Tensor c) {
  Tensor out = torch::stable::empty_like(u);
  with_dtype(u, [&](auto type) {
    using T = decltype(type);
    const auto map = make_map<T>(u, gain, w, s, c);
    torch::stable::parallel_for(0, u.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels<T>().forward(map, read<T>(u), data<T>(out), begin, end);
    });
  });
  return out;
}

// Runs f(begin, end), which returns a Status, over n elements, and returns the worst.
template <class F> int worst(int64_t n, const F& f) {
  std::atomic<int> status{0};
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    const int mine = f(begin, end);
    for (int seen = status; seen < mine && !status.compare_exchange_weak(seen, mine);) {}
  });
  return status;
}

std::tuple<Tensor, int64_t> inverse(Tensor t, Tensor gain, Tensor w, Tensor s, Tensor c) {
  Tensor out = torch::stable::empty_like(t);
  const int64_t status = with_dtype(t, [&](auto type) {
    using T = decltype(type);
    const auto map = make_map<T>(t, gain, w, s, c);
    return worst(t.numel(), [&](int64_t begin, int64_t end) {
      return kernels<T>().inverse(map, read<T>(t), data<T>(out), begin, end);
    });
  });
  return {out, status};
}

std::tuple<Tensor, int64_t> step(Tensor x, Tensor g, double lr, Tensor gain, Tensor w, Tensor s,
                                 Tensor c) {
  Tensor out = torch::stable::empty_like(x);
  const int64_t status = with_dtype(x, [&](auto type) {
    using T = decltype(type);
    const auto map = make_map<T>(x, gain, w, s, c);
    return worst(x.numel(), [&](int64_t begin, int64_t end) {
      return kernels<T>().step(map, read<T>(x), read<T>(g), static_cast<T>(lr), data<T>(out),
                               begin, end);
    });
  });
  return {out, status};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor at, Tensor gain, Tensor w, Tensor s, Tensor c, bool inverted) {
  const auto like = [&](const Tensor& x) { return torch::stable::empty_like(x); };
  Tensor grad_at = like(at), grad_gain = like(at), grad_w = like(w), grad_s = like(s),
         grad_c = like(c);
  with_dtype(at, [&](auto type) {
    using T = decltype(type);
    const auto map = make_map<T>(at, gain, w, s, c);
    const int64_t columns = map.columns, size = map.rows / std::max<int64_t>(columns, 1) * map.n;
    const int64_t block = w.numel();
    const int64_t segments = map.n == 1 ? 1 : std::max<int64_t>((size + kSegment - 1) / kSegment, 1);
    Gradients<T> to{data<T>(grad_at), data<T>(grad_gain), data<T>(grad_w), data<T>(grad_s),
                    data<T>(grad_c), segments, kSegment};
    const Tensor scratch = torch::stable::new_empty(w, {segments > 1 ? 3 * segments * block : 0});
    if (segments > 1) {
      to.w = data<T>(scratch);
      to.s = to.w + segments * block;
      to.c = to.s + segments * block;
    }
    const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(std::min(size, kSegment), 1), 1);
    torch::stable::parallel_for(0, columns * segments, grain, [&](int64_t begin, int64_t end) {
      auto run = inverted ? kernels<T>().inverse_backward : kernels<T>().backward;
      run(map, read<T>(grad), read<T>(at), to, begin, end);
    });
    if (segments == 1) return;
    // Always in the same order, whatever the number of threads.
    T* sums[3] = {data<T>(grad_w), data<T>(grad_s), data<T>(grad_c)};
    for (int which = 0; which < 3; ++which) {
      for (int64_t i = 0; i < block; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < segments; ++j) sum += to.w[(which * segments + j) * block + i];
        sums[which][i] = static_cast<T>(sum);
      }
    }
  });
  return {grad_at, grad_gain, grad_w, grad_s, grad_c};
}

// The columns of a table of maps, a row for each parameter: where its coefficients are, how many, and
// of how many elements of how many bytes. The table is made once (mirror_opt/backends/cpp.py), and
// costs a step one tensor.
enum Field { kGain, kW, kS, kC, kUnits, kColumns, kElements, kWidth, kFields };

template <class T> const T* address(int64_t x) { return reinterpret_cast<const T*>(x); }

// The map of one parameter, in which every column has a row of its own.
template <class T>
Map<T> map_of(const T* gain, const T* w, const T* s, const T* c, int64_t units, int64_t columns,
              int64_t elements) {
  const int64_t n = columns ? elements / columns : 0;
  return {gain, w, s, c, columns, n, columns, columns, static_cast<int>(units)};
}

template <class T> Map<T> map_of(const int64_t* row) {
  return map_of(address<T>(row[kGain]), address<T>(row[kW]), address<T>(row[kS]),
                address<T>(row[kC]), row[kUnits], row[kColumns], row[kElements]);
}

// What a step reads and writes beside the coefficients. Empty lists stand for what there is not.
struct Lists {
  const Tensors &params, &grads, &buffers, &anchors, &duals, &dual_inits;
};

template <class T>
std::vector<Entry<T>> entries_of(const Lists& lists, const std::vector<Map<T>>& maps) {
  std::vector<Entry<T>> entries;
  entries.reserve(maps.size());
  for (size_t i = 0; i < maps.size(); ++i) {
    entries.push_back({maps[i], changed(lists.params, i), stored(lists.grads, i),
                       changed(lists.buffers, i), stored(lists.anchors, i),
                       changed(lists.duals, i), stored(lists.dual_inits, i)});
  }
  return entries;
}

// Runs f(entry, begin, end) over all elements of all entries, and returns the worst Status. They are
// one range, so that a thread has its share of many small ones.
template <class T, class F> int sweep_list(const std::vector<Entry<T>>& entries, const F& f) {
  std::vector<int64_t> ends;
  ends.reserve(entries.size());
  int64_t total = 0;
  for (const Entry<T>& entry : entries) ends.push_back(total += entry.map.rows * entry.map.n);
  return worst(total, [&](int64_t begin, int64_t end) {
    int status = 0;
    for (size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); begin < end; ++i) {
      const int64_t start = i ? ends[i - 1] : 0, stop = std::min(end, ends[i]);
      status = std::max(status, f(entries[i], begin - start, stop - start));
      begin = stop;
    }
    return status;
  });
}

template <class T>
Options<T> options_of(double lr, double momentum, double decay, double scale, bool nesterov,
                      bool primal) {
  Options<T> options{};
  options.lr = static_cast<T>(lr);
  options.momentum = static_cast<T>(momentum);
  options.decay = static_cast<T>(decay);
  options.scale = static_cast<T>(scale);
  options.primal = primal;
  options.nesterov = nesterov;
  return options;
}

template <class T> int take(const std::vector<Entry<T>>& entries, const Options<T>& options) {
  return sweep_list(entries, [&](const Entry<T>& entry, int64_t begin, int64_t end) {
    return kernels<T>().step_(entry, options, begin, end);
  });
}

int64_t step_(Tensors params, Tensors grads, Tensors gains, Tensors w, Tensors s, Tensors c,
              Tensors buffers, Tensors anchors, Tensors duals, Tensors dual_inits, double lr,
              double momentum, double decay, double scale, bool nesterov, bool primal) {
  if (params.empty()) return 0;
  return with_dtype(params[0], [&](auto type) {
    using T = decltype(type);
    std::vector<Map<T>> maps;
    for (size_t i = 0; i < params.size(); ++i) {
      const T* gain = gains.empty() ? nullptr : read<T>(gains[i]);
      maps.push_back(map_of<T>(gain, read<T>(w[i]), read<T>(s[i]), read<T>(c[i]), w[i].size(0),
                               w[i].size(1), params[i].numel()));
    }
    const Lists lists{params, grads, buffers, anchors, duals, dual_inits};
    return take<T>(entries_of<T>(lists, maps),
                   options_of<T>(lr, momentum, decay, scale, nesterov, primal));
  });
}

// Whether a list is as a step takes it: absent, or contiguous tensors of so many elements each, in a
// dtype that T stands for.
template <class T> bool is_plain(const Tensors& list, const int64_t* rows, size_t count) {
  if (list.empty()) return true;
  if (list.size() != count) return false;
  for (size_t i = 0; i < count; ++i) {
    const Storage type = storage(list[i]);
    if (list[i].numel() != rows[i * kFields + kElements] || !list[i].is_contiguous() ||
        (type == Storage::f64) != std::is_same_v<T, double> || type == Storage::f16 ||
        type == Storage::other) {
      return false;
    }
  }
  return true;
}

constexpr int64_t kRefused = -1;

// step_, if it is sure to succeed: if all is plain, and nothing it reads exceeds the bound. Else
// kRefused, and nothing has changed.
int64_t attempt(Tensors params, Tensors grads, Tensors buffers, Tensors anchors, Tensors duals,
                Tensors dual_inits, Tensor table, double lr, double momentum, double decay,
                double scale, bool nesterov, bool primal, double bound) {
  return with_dtype(params[0], [&](auto type) -> int64_t {
    using T = decltype(type);
    const int64_t* rows = read<int64_t>(table);
    const size_t count = params.size();
    if (table.size(0) != static_cast<int64_t>(count)) return kRefused;
    for (size_t i = 0; i < count; ++i) {
      if (rows[i * kFields + kWidth] != sizeof(T)) return kRefused;
    }
    for (const Tensors* list : {&params, &grads, &buffers, &anchors, &duals, &dual_inits}) {
      if (!is_plain<T>(*list, rows, count)) return kRefused;
    }
    std::vector<Map<T>> maps;
    maps.reserve(count);
    for (size_t i = 0; i < count; ++i) maps.push_back(map_of<T>(rows + i * kFields));
    const auto entries = entries_of<T>({params, grads, buffers, anchors, duals, dual_inits}, maps);
    const int beyond = sweep_list(entries, [&](const Entry<T>& entry, int64_t begin, int64_t end) {
      const Stored param = entry.dual.data ? Stored{} : entry.param;
      for (const Stored& x : {param, entry.grad, entry.buffer, entry.anchor, entry.dual, entry.dual_init}) {
        if (x.data && kernels<T>().exceeds(x, static_cast<T>(bound), begin, end)) return 1;
      }
      return 0;
    });
    if (beyond) return kRefused;
    return take<T>(entries, options_of<T>(lr, momentum, decay, scale, nesterov, primal));
  });
}

bool exceeds(Tensors xs, double bound) {
  for (const Tensor& x : xs) {
    STD_TORCH_CHECK(storage(x) != Storage::other, "mirror_opt exceeds: a dtype it does not take");
    const bool found = with_dtype(x, [&](auto type) {
      using T = decltype(type);
      const Stored read = stored(x);
      return worst(x.numel(), [&](int64_t begin, int64_t end) {
        return kernels<T>().exceeds(read, static_cast<T>(bound), begin, end) ? 1 : 0;
      }) != 0;
    });
    if (found) return true;
  }
  return false;
}

// The instruction set in use; a name that this processor supports selects it.
std::string instruction_set(std::string name) {
  for (const InstructionSet* set : supported()) {
    if (name == set->name) active = set;
  }
  return active.load()->name;
}

}  // namespace

STABLE_TORCH_LIBRARY(mirror_opt_cpu, m) {
  m.def("forward(Tensor u, Tensor gain, Tensor w, Tensor s, Tensor c) -> Tensor");
  m.def("inverse(Tensor t, Tensor gain, Tensor w, Tensor s, Tensor c) -> (Tensor, int)");
  m.def(
      "step(Tensor x, Tensor g, float lr, Tensor gain, Tensor w, Tensor s, Tensor c)"
      " -> (Tensor, int)");
  m.def(
      "backward(Tensor grad, Tensor at, Tensor gain, Tensor w, Tensor s, Tensor c, bool inverted)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor[] gains, Tensor[] w, Tensor[] s, Tensor[] c,"
      " Tensor(b!)[] buffers, Tensor[] anchors, Tensor(c!)[] duals, Tensor[] dual_inits, float lr,"
      " float momentum, float decay, float scale, bool nesterov, bool primal) -> int");
  m.def(
      "attempt(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor[] anchors,"
      " Tensor(c!)[] duals, Tensor[] dual_inits, Tensor table, float lr, float momentum, float decay,"
      " float scale, bool nesterov, bool primal, float bound) -> int");
  m.def("exceeds(Tensor[] xs, float bound) -> bool");
  m.def("instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mirror_opt_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("inverse", TORCH_BOX(&inverse));
  m.impl("step", TORCH_BOX(&step));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("step_", TORCH_BOX(&step_));
  m.impl("attempt", TORCH_BOX(&attempt));
  m.impl("exceeds", TORCH_BOX(&exceeds));
}

STABLE_TORCH_LIBRARY_IMPL(mirror_opt_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
