// A device that is not the CPU, in its memory: operations run on the CPU and are told apart by their
// device as those of a GPU are. Two devices in one operation are an error, and what a GPU would be
// waited for is counted.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <map>
#include <set>
#include <string>

namespace {

using Stack = torch::jit::Stack;
const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
std::map<std::string, int64_t> waits;
bool may_wait = true;

void note_wait(const std::string& what) {
  TORCH_CHECK(may_wait, what, " would wait for a GPU");
  waits[what]++;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::PrivateUse1;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Draws the numbers of a CPU's generator.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(at::Generator inner)
      : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(cpu.clone()); }
  at::Generator cpu;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator shared = at::make_generator<Generator>(at::detail::createCPUGenerator());
    return shared;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>(at::detail::createCPUGenerator());
  }
};

bool is_ours(const at::Tensor& t) { return t.defined() && t.device().type() == kDevice.type(); }

void keep_nothing(void*) {}

// One operation: its tensors as tensors of the CPU, and its results as ours.
struct Call {
  std::map<c10::StorageImpl*, c10::Storage> ours_of, cpu_of;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs; // ours, cpu

  at::Tensor to_cpu(const at::Tensor& t) {
    if (!is_ours(t)) return t;
    for (auto& [ours, cpu] : pairs)
      if (ours.is_same(t)) return cpu;
    auto* key = t.storage().unsafeGetStorageImpl();
    if (!cpu_of.count(key)) {
      auto held = new c10::Storage(t.storage());
      at::DataPtr pointer(t.storage().mutable_data(), held, [](void* h) { delete static_cast<c10::Storage*>(h); }, c10::kCPU);
      auto storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(), std::move(pointer), c10::GetAllocator(c10::kCPU), true));
      cpu_of[key] = storage;
      ours_of[storage.unsafeGetStorageImpl()] = t.storage();
    }
    auto made = of(cpu_of[key], t, c10::DispatchKey::CPU);
    pairs.emplace_back(t, made);
    return made;
  }

  at::Tensor to_ours(const at::Tensor& t) {
    if (!t.defined() || t.device().type() != c10::kCPU) return t;
    for (auto& [ours, cpu] : pairs)
      if (cpu.is_same(t)) return ours;
    return of(ours_storage(t), t, c10::DispatchKey::PrivateUse1);
  }

  c10::Storage ours_storage(const at::Tensor& t) {
    auto* key = t.storage().unsafeGetStorageImpl();
    if (!ours_of.count(key)) {
      auto held = new c10::Storage(t.storage());
      at::DataPtr pointer(t.storage().mutable_data(), held, [](void* h) { delete static_cast<c10::Storage*>(h); }, kDevice);
      ours_of[key] = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(), std::move(pointer), c10::GetAllocator(c10::kCPU), false));
    }
    return ours_of[key];
  }

  static at::Tensor of(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.is_conj()) made._set_conj(true);
    if (like.is_neg()) made._set_neg(true);
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
  }

  // Where `out=` was resized, ours are too.
  void resize_ours() {
    for (auto& [ours, cpu] : pairs) {
      auto* key = cpu.storage().unsafeGetStorageImpl();
      bool moved = cpu.storage().data() != ours.storage().data() || cpu.storage().nbytes() != ours.storage().nbytes();
      if (moved) {
        ours_of.erase(key);
        auto* impl = ours.storage().unsafeGetStorageImpl();
        auto held = new c10::Storage(cpu.storage());
        impl->set_data_ptr_noswap(at::DataPtr(cpu.storage().mutable_data(), held, [](void* h) { delete static_cast<c10::Storage*>(h); }, kDevice));
        impl->set_nbytes(cpu.storage().nbytes());
      }
      if (ours.sizes() != cpu.sizes() || ours.strides() != cpu.strides() || ours.storage_offset() != cpu.storage_offset())
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

// What waits for a GPU, as far as it is known here: CUDA was not asked. Factorisations that look at their errors are
// among them.
const std::set<std::string> kWaits = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::_linalg_check_errors", "aten::_linalg_solve_ex",
    "aten::repeat_interleave", "aten::bincount", "aten::is_nonzero", "aten::_linalg_eigvals", "aten::linalg_eig"};
const std::set<std::string> kAnyDevice = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  Call call;
  bool stays_on_cpu = false, any_ours = false, any_cpu = false, is_mask = false;
  auto look = [&](const at::Tensor& t) {
    if (!t.defined()) return;
    if (is_ours(t)) any_ours = true;
    else if (t.dim() > 0) any_cpu = true;
  };
  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      look(value.toTensor());
      value = call.to_cpu(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& t : value.toTensorVector()) { look(t); made.push_back(call.to_cpu(t)); }
      value = made;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      for (const auto& item : value.toOptionalTensorVector()) {
        if (item && item->defined()) {
          look(*item);
          is_mask = is_mask || item->scalar_type() == at::kBool;
          made.push_back(call.to_cpu(*item));
        } else {
          made.push_back(item);
        }
      }
      value = made;
    } else if (value.isDevice()) {
      if (value.toDevice().type() == kDevice.type()) value = c10::Device(c10::kCPU);
      else stays_on_cpu = true;
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == kDevice.type(), name, ": a generator of another device");
      value = generator.get<Generator>()->cpu;
    }
  }
  TORCH_CHECK(!(any_ours && any_cpu) || kAnyDevice.count(name), name, ": tensors of two devices");
  if (kWaits.count(name) || is_mask) note_wait(name);
  op.callBoxed(stack);
  call.resize_ours();
  const auto results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (stays_on_cpu) continue;
    if (value.isTensor()) {
      value = call.to_ours(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& t : value.toTensorVector()) made.push_back(call.to_ours(t));
      value = made;
    }
  }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (is_ours(from) != is_ours(to) && !non_blocking) note_wait(is_ours(from) ? "a copy to the CPU" : "a copy from the CPU");
  Call call;
  call.to_cpu(to).copy_(call.to_cpu(from));
  return to;
}

// PyTorch asks other devices for these in place of its own.
at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  Call call;
  auto own_bias = bias && bias->defined() ? std::optional<at::Tensor>(call.to_cpu(*bias)) : std::nullopt;
  return call.to_ours(at::convolution(call.to_cpu(input), call.to_cpu(weight), own_bias, stride, padding, dilation,
      transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(const at::Tensor& gradient,
    const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  Call call;
  std::vector<int64_t> channels{gradient.size(1)};
  auto [a, b, c] = at::convolution_backward(call.to_cpu(gradient), call.to_cpu(input), call.to_cpu(weight),
      at::IntArrayRef(channels), stride, padding, dilation, transposed, output_padding, groups, mask);
  return {call.to_ours(a), call.to_ours(b), call.to_ours(c)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
// Autocast changes nothing here.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kDevice.type(), c10::GetAllocator(c10::kCPU), 0);
  m.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def("may_wait", [](bool may) { may_wait = may; });
  m.def("waits", [] { return waits; });
  m.def("forget_waits", [] { waits.clear(); });
}
