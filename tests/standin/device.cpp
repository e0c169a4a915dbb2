// A GPU that is played by the CPU: tensors of device "cuda" whose memory is the host's and whose ops are those of the CPU.
//
// What is as on a GPU: the dispatch key, so autograd has a thread of its own for the device; that tensors of two devices
// cannot be mixed; process groups that take tensors of the device alone, contiguous, of the types that NCCL has.
// What is not: kernels, streams (all work is done when a call returns), and memory of its own.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/chrono.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace {

constexpr auto kDevice = c10::DeviceType::CUDA;
c10::DeviceIndex num_devices = 8;
thread_local c10::DeviceIndex current = 0;

// -- the device -----------------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return {kDevice, current}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < num_devices, "CUDA error: invalid device ordinal");
    if (device.index() >= 0) current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return num_devices; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

std::atomic<int64_t> used{0}, peak{0};  // bytes of tensors

/// Memory of the device: that of a storage of the CPU, which is kept.
c10::DataPtr counted(c10::Storage storage) {
  struct Kept {
    c10::Storage storage;
    int64_t size;
    ~Kept() { used -= size; }
  };
  auto* kept = new Kept{std::move(storage), 0};
  kept->size = static_cast<int64_t>(kept->storage.nbytes());
  const int64_t now = used += kept->size;
  for (int64_t before = peak; before < now && !peak.compare_exchange_weak(before, now);) {}
  const c10::Device device(kDevice, current);
  return {kept->storage.mutable_data(), kept, [](void* p) { delete static_cast<Kept*>(p); }, device};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    return counted(c10::Storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), size, c10::GetCPUAllocator(), false)));
  }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
} memory;

std::mutex lock;
std::unordered_set<const void*> pinned;

struct Pinned final : c10::Allocator {  // memory of the host
  c10::DataPtr allocate(size_t size) override {
    auto* kept = new c10::DataPtr(c10::GetCPUAllocator()->allocate(size));
    const std::lock_guard<std::mutex> guard(lock);
    pinned.insert(kept->get());
    return {kept->get(), kept, [](void* p) {
              auto* kept = static_cast<c10::DataPtr*>(p);
              const std::lock_guard<std::mutex> guard(lock);
              pinned.erase(kept->get());
              delete kept;
            }, c10::kCPU};
  }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
} pinning;

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex deviceCount() const override { return num_devices; }
  int getNumGPUs() const override { return num_devices; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Device getDeviceFromPtr(void*) const override { return {kDevice, current}; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinning; }
  bool isPinnedPtr(const void* data) const override {
    const std::lock_guard<std::mutex> guard(lock);
    return pinned.count(data) > 0;
  }
  at::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::CUDAHooksArgs;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// -- ops ------------------------------------------------------------------------------------------------------------

c10::DataPtr borrowed(c10::Storage storage) {  // for the CPU, memory of the device
  auto* keeper = new c10::Storage(std::move(storage));
  return {keeper->mutable_data(), keeper, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::kCPU};
}

at::Tensor over(at::Tensor made, const at::Tensor& like) {
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  return over(at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype()), like);
}

/// Tensors of the device, as tensors of the CPU over the same memory, for the time of one op.
class Played {
 public:
  at::Tensor on_host(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kDevice) return tensor;
    auto* own = tensor.storage().unsafeGetStorageImpl();
    auto found = hosts_.find(own);
    if (found == hosts_.end()) {
      auto host = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), own->nbytes(), borrowed(tensor.storage()), c10::GetCPUAllocator(), true);
      found = hosts_.emplace(own, Pair{c10::Storage(host), tensor.storage(), own->mutable_data(), tensor.key_set()}).first;
    }
    auto made = over(found->second.host, c10::DispatchKey::CPU, tensor);
    pairs_.emplace_back(tensor, made);
    return made;
  }

  at::Tensor on_device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != c10::kCPU) return tensor;
    for (const auto& [before, host] : pairs_)
      if (host.is_same(tensor)) return before;
    for (const auto& [own, pair] : hosts_)
      if (pair.host.is_alias_of(tensor.storage()))
        return over(
            at::detail::make_tensor<c10::TensorImpl>(
                c10::TensorImpl::VIEW, c10::Storage(pair.device), pair.keys, tensor.dtype()),
            tensor);
    const size_t size = tensor.storage().nbytes();
    auto made = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), size, counted(tensor.storage()), &memory, true);
    return over(c10::Storage(made), c10::DispatchKey::CUDA, tensor);
  }

  /// What an op did to its arguments beside their values: other sizes, other memory.
  void finish() {
    for (auto& [own, pair] : hosts_) {
      if (pair.host.mutable_data() == pair.memory && pair.host.nbytes() == own->nbytes()) continue;
      const size_t size = pair.host.nbytes();
      own->set_data_ptr_noswap(counted(pair.host));
      own->set_nbytes(size);
    }
    for (auto& [before, host] : pairs_) {
      if (before.sizes() == host.sizes() && before.strides() == host.strides() && before.storage_offset() == host.storage_offset())
        continue;
      before.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

 private:
  struct Pair { c10::Storage host, device; const void* memory; c10::DispatchKeySet keys; };
  std::unordered_map<c10::StorageImpl*, Pair> hosts_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
};

template <typename Each>
c10::IValue mapped(const c10::IValue& value, const Each& each) {
  if (value.isTensor()) return each(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& tensor : value.toTensorVector()) made.push_back(each(tensor));
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      made.push_back(tensor ? std::optional<at::Tensor>(each(*tensor)) : std::nullopt);
    return made;
  }
  return value;
}

/// Is told of an op for which the host waits until the device has done all before: a value or a size that it reads.
std::function<void(const char*)> on_wait;

void waits(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t begin) {
  if (!on_wait) return;
  static const std::unordered_set<std::string> reading = {
      "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::nonzero_numpy"};
  const auto& name = op.schema().name();
  bool is_read = reading.count(name) > 0;
  if (name == "aten::copy_") {
    const auto &to = stack[begin].toTensor(), &from = stack[begin + 1].toTensor();
    if (to.device() != from.device()) return on_wait(to.is_cpu() ? "to the host" : "to the device");
  }
  if (name == "aten::repeat_interleave") is_read = stack.size() - begin < 2 || stack[begin + 1].isNone();
  if (name == "aten::index" || name == "aten::_index_put_impl_")
    for (const std::optional<at::Tensor>& index : stack[begin + 1].toOptionalTensorList())
      is_read |= index && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
  if (is_read) on_wait(name.c_str());
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack, bool one_device) {
  const auto& schema = op.schema();
  const size_t num_arguments = schema.arguments().size(), num_returns = schema.returns().size();
  const auto begin = stack->size() - num_arguments;
  const bool takes_numbers = schema.name().find("_fused_") == std::string::npos;  // of the host, as tensors without dims
  if (one_device)
    for (size_t i = begin; i < stack->size(); ++i)
      mapped((*stack)[i], [&](const at::Tensor& tensor) {
        TORCH_CHECK(
            !tensor.defined() || tensor.device().type() == kDevice || (tensor.dim() == 0 && takes_numbers),
            "Expected all tensors to be on the same device, but argument ", schema.arguments()[i - begin].name(), " of ",
            schema.operator_name(), " is on ", tensor.device());
        return tensor;
      });
  waits(op, *stack, begin);
  Played played;
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().type() == kDevice) value = c10::Device(c10::kCPU);
    else value = mapped(value, [&](const at::Tensor& tensor) { return played.on_host(tensor); });
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  played.finish();
  for (size_t i = stack->size() - num_returns; i < stack->size(); ++i)
    (*stack)[i] = mapped((*stack)[i], [&](const at::Tensor& tensor) { return played.on_device(tensor); });
}

void same_device(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { run_on_host(op, stack, true); }
void any_device(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { run_on_host(op, stack, false); }

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kDevice)).has_index() ? *device : c10::Device(kDevice, current));
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kDevice)).has_index() ? *device : c10::Device(kDevice, current));
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  if (stride.data() == nullptr || stride.size() != size.size()) {
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    self.unsafeGetTensorImpl()->set_storage_offset(offset);
  } else {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

int64_t math_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {  // CUDA has integers
  return at::histc(self.to(c10::kCPU, at::kDouble), bins, min, max).to(self.device(), self.scalar_type());
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&same_device>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_fused_sdp_choice", &math_attention);
  m.impl("histc", &histc);
  m.impl("record_stream", &record_stream);
  // What would choose among kernels of a GPU, or call others.
  for (const char* name : {"_grouped_mm", "convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&same_device>());
  // Of these, CUDA takes indices, or a source, of the CPU too.
  for (const char* name : {"copy_", "index.Tensor", "_index_put_impl_", "_copy_from", "_copy_from_and_resize"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&any_device>());
}

// -- process groups -------------------------------------------------------------------------------------------------

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

/// What NCCL has no type for, or cannot reach, is refused as it refuses it.
void check(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device().type() == kDevice, "Tensors must be CUDA and dense: ", name, " of ", tensor.device());
  TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous: ", name);
  switch (tensor.scalar_type()) {
    case at::kChar: case at::kByte: case at::kInt: case at::kLong: case at::kHalf: case at::kFloat: case at::kDouble:
    case at::kBFloat16: case at::kBool: case at::kFloat8_e4m3fn: case at::kFloat8_e5m2:
      return;
    default:
      TORCH_CHECK(false, "Unconvertible NCCL type ", tensor.scalar_type(), ": ", name);
  }
}

/// Makes a group for `Group::split`, of a store, this rank, the number of ranks and a timeout.
using Make = c10::intrusive_ptr<c10d::Backend>(c10::intrusive_ptr<c10d::Store>, int, int, std::chrono::milliseconds);
std::function<Make> host_group;

/// A process group of the device: the work is done by a group of the CPU over the same memory.
class Group final : public c10d::Backend {
 public:
  Group(c10::intrusive_ptr<c10d::Backend> host, int rank, int size) : Backend(rank, size), host_(std::move(host)) {}

  const std::string getBackendName() const override { return "nccl"; }
  void setTimeout(std::chrono::milliseconds timeout) override { host_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { host_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return host_->getSequenceNumberForGroup(); }
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> split(
      const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
      const c10::intrusive_ptr<Options>& opts) override {
    const auto own = std::find(ranks.begin(), ranks.end(), rank_);
    if (own == ranks.end()) return nullptr;
    return host_group(store, static_cast<int>(own - ranks.begin()), static_cast<int>(ranks.size()), opts->timeout);
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override {
    auto host = hosts(tensors, "broadcast");
    return host_->broadcast(host, opts);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override {
    auto host = hosts(tensors, "allreduce");
    auto sums = opts;
    const bool is_mean = summed(sums.reduceOp);
    return divided(host_->allreduce(host, sums), host, is_mean);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) override {
    WorkPtr work;
    for (auto& tensor : tensors) {
      Tensors one{tensor};
      work = allreduce(one, opts);
      work->wait();
    }
    return work;
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override {
    auto host = hosts(tensors, "reduce");
    return host_->reduce(host, opts);
  }
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override {
    auto host_outputs = lists(outputs, "allgather");
    auto host_inputs = hosts(inputs, "allgather");
    return host_->allgather(host_outputs, host_inputs, opts);
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) override {
    auto host_output = host(output, "allgather"), host_input = host(input, "allgather");
    return host_->_allgather_base(host_output, host_input, opts);
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override {
    WorkPtr work;
    for (size_t i = 0; i < outputs.size(); ++i) {
      work = _allgather_base(outputs[i], inputs[i], opts);
      work->wait();
    }
    return work;
  }
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts) override {
    auto host_outputs = lists(outputs, "gather");
    auto host_inputs = hosts(inputs, "gather");
    return host_->gather(host_outputs, host_inputs, opts);
  }
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) override {
    auto host_outputs = hosts(outputs, "scatter");
    auto host_inputs = lists(inputs, "scatter");
    return host_->scatter(host_outputs, host_inputs, opts);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& opts) override {
    auto host_output = host(output, "reduce_scatter"), host_input = host(input, "reduce_scatter");
    auto sums = opts;
    const bool is_mean = summed(sums.reduceOp);
    return divided(host_->_reduce_scatter_base(host_output, host_input, sums), {host_output}, is_mean);
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) override {
    WorkPtr work;
    for (size_t i = 0; i < outputs.size(); ++i) {
      work = _reduce_scatter_base(outputs[i], inputs[i], opts);
      work->wait();
    }
    return work;
  }
  WorkPtr alltoall_base(
      at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes, std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& opts) override {
    auto host_output = host(output, "alltoall"), host_input = host(input, "alltoall");
    return host_->alltoall_base(host_output, host_input, output_sizes, input_sizes, opts);
  }
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto host = hosts(tensors, "send");
    return host_->send(host, to, tag);
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto host = hosts(tensors, "recv");
    return host_->recv(host, from, tag);
  }
  WorkPtr barrier(const c10d::BarrierOptions& opts) override { return host_->barrier(opts); }

 private:
  static at::Tensor host(const at::Tensor& tensor, const char* name) {
    check(tensor, name);
    return Played().on_host(tensor);
  }
  static Tensors hosts(const Tensors& tensors, const char* name) {
    Tensors made;
    for (const auto& tensor : tensors) made.push_back(host(tensor, name));
    return made;
  }
  static std::vector<Tensors> lists(const std::vector<Tensors>& lists, const char* name) {
    std::vector<Tensors> made;
    for (const auto& tensors : lists) made.push_back(hosts(tensors, name));
    return made;
  }
  static bool summed(c10d::ReduceOp& op) {  // gloo has no means
    const bool is_mean = op == c10d::ReduceOp::AVG;
    if (is_mean) op = c10d::ReduceOp::SUM;
    return is_mean;
  }
  WorkPtr divided(WorkPtr work, const Tensors& tensors, bool is_mean) const {
    if (is_mean) {
      work->wait();
      for (auto tensor : tensors)
        tensor.is_floating_point() ? tensor.div_(size_) : tensor.div_(size_, "trunc");
    }
    return work;
  }

  c10::intrusive_ptr<c10d::Backend> host_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kDevice, &memory);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&math_attention);
  py::class_<Group, c10::intrusive_ptr<Group>, c10d::Backend>(m, "Group")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>, int, int>());
  m.def("resize", [](const at::Tensor& tensor, size_t size) {  // of its storage
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto made = memory.allocate(size);
    if (const auto kept = std::min(size, storage->nbytes())) memcpy(made.get(), storage->data(), kept);
    storage->set_data_ptr_noswap(std::move(made));
    storage->set_nbytes(size);
  });
  m.def("memory_allocated", [] { return used.load(); });
  m.def("max_memory_allocated", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = used.load(); });
  m.def("watch_waits", [](std::optional<py::function> told) {
    on_wait = nullptr;
    if (told)
      on_wait = [told = *told](const char* name) {
        py::gil_scoped_acquire lock;
        told(name);
      };
  });
  m.def("split_by", [](const py::function& make) {
    auto* kept = new py::function(make);  // for good: when the process ends, Python is gone before what is static
    host_group = [kept](auto store, int rank, int size, auto timeout) {
      py::gil_scoped_acquire lock;
      return (*kept)(store, rank, size, timeout).template cast<c10::intrusive_ptr<c10d::Backend>>();
    };
  });
  m.def("set_device", [](int index) { Guard().setDevice({kDevice, static_cast<c10::DeviceIndex>(index)}); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("device_count", [] { return static_cast<int>(num_devices); });
  m.def("set_device_count", [](int count) { num_devices = static_cast<c10::DeviceIndex>(count); });
}
