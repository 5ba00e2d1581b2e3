// Pretend CUDA devices for a torch that is built without CUDA.
//
// Tensors on them have the device type CUDA, so that torch refuses what it refuses on a real
// device: operands on different devices, and a generator of the wrong device. Their memory is the
// host's. Every operator runs on the processor, in `boxed_fallback`, after these checks.
//
// What a real device does with delay happens here with delay too. A copy to pinned host memory
// that does not block leaves NaN in its destination until the host waits for the device. A copy
// from pinned memory reads its source only when the device works next.
//
// `pretend_cuda.py` compiles and loads this file, and replaces the functions of torch.cuda.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

// ---------------------------------------------------------------------------------------------
// Events: what the Python side is told. Kinds are the letters below.

enum Kind : int { UPLOAD = 0, DOWNLOAD = 1, WAIT = 2 };
// Arguments: kind, operator, bytes, whether the host memory of a copy is pinned.
using Listener = void (*)(int, const char*, int64_t, int);
std::atomic<Listener> listener_{nullptr};

void tell(Kind kind, const std::string& name, int64_t bytes, bool pinned) {
  if (Listener listener = listener_.load()) listener(kind, name.c_str(), bytes, pinned);
}

// ---------------------------------------------------------------------------------------------
// Memory

constexpr DeviceIndex MAX_DEVICES = 8;
constexpr size_t HEADER = 64;  // bytes before each allocation; they hold its size and device

DeviceIndex device_count_ = 1;
thread_local DeviceIndex current_ = 0;
std::atomic<int64_t> allocated_[MAX_DEVICES];
std::atomic<int64_t> peak_[MAX_DEVICES];

struct Header {
  size_t bytes;
  DeviceIndex device;
};

void release(void* data) {
  if (data == nullptr) return;
  char* base = static_cast<char*>(data) - HEADER;
  auto* header = reinterpret_cast<Header*>(base);
  allocated_[header->device] -= static_cast<int64_t>(header->bytes);
  std::free(base);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* base = nullptr;
    TORCH_CHECK(posix_memalign(&base, HEADER, bytes + HEADER) == 0, "CUDA out of memory");
    *static_cast<Header*>(base) = {bytes, current_};
    int64_t total = allocated_[current_] += static_cast<int64_t>(bytes);
    if (total > peak_[current_]) peak_[current_] = total;
    void* data = static_cast<char*>(base) + HEADER;
    // As on a real device, new memory holds anything.
    std::memset(data, 0xFF, bytes);
    return {data, data, &release, Device(DeviceType::CUDA, current_)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
DeviceAllocator device_allocator_;

std::mutex pinned_lock_;
std::map<uintptr_t, size_t> pinned_;  // address -> bytes

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock_);
  auto address = reinterpret_cast<uintptr_t>(data);
  auto next = pinned_.upper_bound(address);
  if (next == pinned_.begin()) return false;
  --next;
  return address < next->first + next->second;
}

void settle();

void release_pinned(void* data) {
  if (data == nullptr) return;
  settle();
  {
    std::lock_guard<std::mutex> guard(pinned_lock_);
    pinned_.erase(reinterpret_cast<uintptr_t>(data));
  }
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, bytes + 1) == 0, "out of pinned memory");
    std::lock_guard<std::mutex> guard(pinned_lock_);
    pinned_[reinterpret_cast<uintptr_t>(data)] = bytes + 1;
    return {data, data, &release_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
PinnedAllocator pinned_allocator_;

// ---------------------------------------------------------------------------------------------
// Copies that do not block, in the order in which they were begun

std::recursive_mutex queue_lock_;
std::vector<std::function<void()>> uploads_, downloads_;

void run(std::vector<std::function<void()>>& queue) {
  auto copies = std::move(queue);
  queue.clear();
  for (auto& copy : copies) copy();
}

// Do the uploads that were begun, as the device does before anything that is begun later. What they
// read may itself be the result of a download.
void begin_next() {
  std::lock_guard<std::recursive_mutex> guard(queue_lock_);
  if (uploads_.empty()) return;
  run(downloads_);
  run(uploads_);
}

// Do all copies that were begun. Only now may the host read what it has downloaded.
void settle() {
  std::lock_guard<std::recursive_mutex> guard(queue_lock_);
  run(downloads_);
  run(uploads_);
}

// ---------------------------------------------------------------------------------------------
// Devices, streams and generators

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    Device before(DeviceType::CUDA, current_);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {DeviceType::CUDA, current_}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < device_count_, "CUDA error: invalid device ordinal");
    if (device.index() >= 0) current_ = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_ = device.index();
  }
  Stream getStream(Device device) const override { return default_stream(device); }
  Stream getDefaultStream(Device device) const override { return default_stream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    return default_stream(device);
  }
  Stream getNewStream(Device device, int) const override { return default_stream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return device_count_; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { wait(); }
  void synchronizeEvent(void*) const override { wait(); }
  void synchronizeDevice(const DeviceIndex) const override { wait(); }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}

  static void wait() {
    settle();
    tell(WAIT, "synchronize", 0, false);
  }
  static Stream default_stream(Device device) {
    const DeviceIndex index = device.index() < 0 ? current_ : device.index();
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index));
  }
};

// A generator of a device. Its numbers are those of a generator of the processor with its seed.
struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index)
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->inner = inner.clone();
    return copy;
  }
  at::Generator inner;
};

const at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < MAX_DEVICES; ++i)
      made.push_back(at::make_generator<DeviceGenerator>(i));
    return made;
  }();
  return all.at(index < 0 ? current_ : index);
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current_; }
  DeviceIndex deviceCount() const override { return device_count_; }
  int getNumGPUs() const override { return device_count_; }
  void setCurrentDevice(DeviceIndex index) const override {
    DeviceGuard().setDevice({DeviceType::CUDA, index});
  }
  DeviceIndex getCurrentDevice() const override { return current_; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return DeviceGuard().exchangeDevice({DeviceType::CUDA, index}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  void deviceSynchronize(DeviceIndex) const override { DeviceGuard::wait(); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator_; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator_; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? current_ : index);
  }
};

// ---------------------------------------------------------------------------------------------
// Operators that a device must have itself: new tensors, views and copies

struct OnDevice {
  explicit OnDevice(DeviceIndex index) : before(current_) { current_ = index; }
  ~OnDevice() { current_ = before; }
  DeviceIndex before;
};

DeviceIndex index_of(std::optional<Device> device) {
  DeviceIndex index = device && device->has_index() ? device->index() : current_;
  TORCH_CHECK(index < device_count_, "CUDA error: invalid device ordinal");
  return index;
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool> pin,
             std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  OnDevice guard(index_of(device));
  return at::detail::empty_generic(size, &device_allocator_,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  OnDevice guard(index_of(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator_,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the processor.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU);
  char* data = static_cast<char*>(const_cast<void*>(tensor.storage().data()));
  data += tensor.storage_offset() * tensor.element_size();
  auto out =
      at::from_blob(data, tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
  if (tensor.is_conj()) out._set_conj(true);
  return out;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool up = self.is_cuda() && !source.is_cuda();
  const bool down = !self.is_cuda() && source.is_cuda();
  if (!up && !down) {
    begin_next();
    on_host(self).copy_(on_host(source));
    return self;
  }
  const bool pinned = is_pinned(up ? source.const_data_ptr() : self.const_data_ptr());
  // A change of dtype happens on the host: an upload has the dtype of its destination. Numbers
  // alone (no dimensions) travel with a kernel's arguments.
  const int64_t bytes = down ? source.nbytes() : self.numel() * self.element_size();
  const bool plain = self.scalar_type() == source.scalar_type() && self.is_contiguous() &&
                     source.is_contiguous() && self.sizes() == source.sizes();
  const bool later = non_blocking && pinned && plain && self.numel() > 0;
  tell(up ? UPLOAD : DOWNLOAD, "copy_", bytes, pinned);
  if (!later) {
    settle();
    on_host(self).copy_(on_host(source));
    tell(WAIT, up ? "upload" : "download", 0, pinned);
    return self;
  }
  begin_next();
  if (up) {
    std::lock_guard<std::recursive_mutex> guard(queue_lock_);
    uploads_.push_back([to = on_host(self), source] { const_cast<Tensor&>(to).copy_(source); });
  } else {
    Tensor now = on_host(source).clone();
    void* to = self.mutable_data_ptr();
    std::memset(to, 0xFF, self.nbytes());  // NaN, for every dtype of floats
    std::lock_guard<std::recursive_mutex> guard(queue_lock_);
    // The destination is not kept alive here, but freeing pinned memory settles the queue first.
    downloads_.push_back([to, now] { std::memcpy(to, now.const_data_ptr(), now.nbytes()); });
  }
  return self;
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size,
                      std::optional<at::MemoryFormat> format) {
  if (self.sizes() == size) return self;
  begin_next();
  int64_t count = self.storage_offset();
  count += c10::multiply_integers(size);
  const size_t bytes = count * self.element_size();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) {
    OnDevice guard(self.device().index());
    auto larger = device_allocator_.allocate(bytes);
    std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Contiguous && *format != at::MemoryFormat::Preserve)
    impl->empty_tensor_restride(*format);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) {
    if (to.is_cuda()) {
      resize_(to, self.sizes(), std::nullopt);
    } else {
      to.resize_(self.sizes());
    }
  }
  on_host(to).copy_(on_host(self));
  return to;
}

Tensor view_of(const Tensor& self, caffe2::TypeMeta dtype, at::IntArrayRef size,
               at::IntArrayRef stride, int64_t offset) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), dtype);
  out.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return out;
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                  std::optional<int64_t> offset) {
  return view_of(self, self.dtype(), size, stride, offset.value_or(self.storage_offset()));
}

Tensor view(const Tensor& self, at::IntArrayRef size) {
  auto wanted = on_host(self).view(size);
  return view_of(self, self.dtype(), wanted.sizes(), wanted.strides(), self.storage_offset());
}

Tensor view_dtype(const Tensor& self, at::ScalarType dtype) {
  auto wanted = on_host(self).view(dtype);
  int64_t offset = self.storage_offset() * self.element_size() / wanted.element_size();
  return view_of(self, c10::scalarTypeToTypeMeta(dtype), wanted.sizes(), wanted.strides(), offset);
}

Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return view_of(self, self.dtype(), size, stride, self.storage_offset());
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  auto wanted = on_host(self).unfold(dimension, size, step);
  return view_of(self, self.dtype(), wanted.sizes(), wanted.strides(), self.storage_offset());
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                    at::IntArrayRef stride) {
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (strides.size() != size.size()) {
    strides.assign(size.size(), 1);
    for (int64_t i = static_cast<int64_t>(size.size()) - 2; i >= 0; --i)
      strides[i] = strides[i + 1] * size[i + 1];
  }
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(size, strides, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {count}, {});
}

at::Scalar local_scalar(const Tensor& self) {
  settle();
  tell(WAIT, "item", 0, false);
  return on_host(self).item();
}

// ---------------------------------------------------------------------------------------------
// All other operators

// The shape of their result depends on values, so the host waits for it.
const std::set<std::string> WAITING = {
    "aten::nonzero",  "aten::equal",      "aten::masked_select", "aten::_unique2",
    "aten::bincount", "aten::unique_dim", "aten::unique_consecutive",
};
// They accept indices on the host, which are sent.
const std::set<std::string> INDEXING = {"aten::index", "aten::_index_put_impl_",
                                        "aten::index_put_", "aten::index_put"};
// cuBLAS multiplies no integers.
const std::set<std::string> PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
                                        "aten::addmv", "aten::addmv_", "aten::dot"};

std::mutex operators_lock_;
std::set<std::string> operators_;

// A result of the processor as a tensor of a device, with the same strides.
Tensor on_device(const Tensor& result, DeviceIndex index) {
  if (!result.defined()) return result;
  Tensor out = empty_strided(result.sizes(), result.strides(), result.scalar_type(), std::nullopt,
                             Device(DeviceType::CUDA, index), std::nullopt);
  on_host(out).copy_(result);
  return out;
}

// The operands of one call: what was given, and the same memory as tensors of the processor.
class Operands {
 public:
  Operands(std::string name, bool indexing) : name_(std::move(name)), indexing_(indexing) {}

  void check(const Tensor& tensor) {
    if (!tensor.defined() || tensor.is_meta()) return;
    // The value of a CPU tensor without dimensions travels as a number.
    if (!tensor.is_cuda() && tensor.dim() == 0) return;
    if (!device) device = tensor.device();
    TORCH_CHECK(tensor.device() == *device && tensor.is_cuda(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                tensor.device(), " and ", *device, "! (", name_, " on a pretend device)");
    TORCH_CHECK(!PRODUCTS.count(name_) || tensor.is_floating_point() || tensor.is_complex(), "\"",
                name_, "\" not implemented for '", tensor.scalar_type(), "' on CUDA");
  }

  void check_index(const Tensor& tensor) {
    if (!tensor.defined()) return;
    // Booleans are turned into positions, whose number the host must know.
    waits |= tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
    if (!tensor.is_cuda() && tensor.dim()) {
      tell(UPLOAD, "index", tensor.nbytes(), is_pinned(tensor.const_data_ptr()));
      waits = true;
    }
  }

  c10::IValue replaced(const c10::IValue& value) {
    if (value.isTensor()) {
      const Tensor& tensor = value.toTensor();
      check(tensor);
      return host(tensor);
    }
    if (value.isGenerator() && value.toGenerator().defined()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == DeviceType::CUDA,
                  "Expected a 'cuda' device type for generator but found '",
                  generator.device().type(), "'");
      return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
    }
    if (value.isDevice()) return Device(at::kCPU);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) {
        indexing_ ? check_index(tensor) : check(tensor);
        list.push_back(host(tensor));
      }
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor) indexing_ ? check_index(*tensor) : check(*tensor);
        list.push_back(tensor ? std::optional<Tensor>(host(*tensor)) : std::nullopt);
      }
      return list;
    }
    return value;
  }

  // The tensor that was given, for one that the operator has written to.
  Tensor given(const Tensor& result) {
    for (const auto& [given, host] : pairs_) {
      if (!host.is_same(result)) continue;
      // A destination without elements takes the size of the result.
      if (given.is_cuda() && given.numel() == 0 && result.numel() != 0)
        copy_from_and_resize(result, given);
      return given;
    }
    TORCH_CHECK(false, name_, " returns a view, which a pretend device does not know");
  }

  std::optional<Device> device;
  bool waits = false;

 private:
  Tensor host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    Tensor same = tensor;
    if (tensor.is_cuda())
      same = tensor.numel() ? on_host(tensor) : at::empty(tensor.sizes(), tensor.scalar_type());
    pairs_.emplace_back(tensor, same);
    return same;
  }

  std::string name_;
  bool indexing_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// Run an operator on the processor, on the memory of its operands. Nothing is copied, so that
// operands keep their strides, on which the last bits of a product depend.
void boxed_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  {
    std::lock_guard<std::mutex> guard(operators_lock_);
    operators_.insert(schema.overload_name().empty() ? name : name + "." + schema.overload_name());
  }
  begin_next();
  Operands operands(name, INDEXING.count(name) != 0);
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = first; i < stack->size(); ++i) (*stack)[i] = operands.replaced((*stack)[i]);
  if (operands.waits || WAITING.count(name)) {
    settle();
    tell(WAIT, name, 0, false);
  }
  const DeviceIndex index = operands.device ? operands.device->index() : current_;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto& returns = schema.returns();
  for (size_t i = 0; i < returns.size(); ++i) {
    c10::IValue& value = (*stack)[stack->size() - returns.size() + i];
    const auto* alias = returns[i].alias_info();
    if (value.isTensor() && value.toTensor().defined()) {
      value = alias ? operands.given(value.toTensor()) : on_device(value.toTensor(), index);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector())
        list.push_back(alias ? operands.given(tensor) : on_device(tensor, index));
      value = list;
    }
  }
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, DeviceGuard)
namespace at {
using PretendHooks = Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&boxed_fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize_);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("view.dtype", &view_dtype);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("_local_scalar_dense", &local_scalar);
  // Without a kernel of the device, torch would take these apart and round otherwise.
  for (const char* name : {"native_layer_norm", "native_layer_norm_backward", "native_group_norm",
                           "native_group_norm_backward", "addr", "addr.out", "silu_backward",
                           "convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&boxed_fallback>());
}

static const bool installed_ = [] {
  c10::SetAllocator(DeviceType::CUDA, &device_allocator_, 255);
  return true;
}();

extern "C" {
void pretend_set_device_count(int count) { device_count_ = static_cast<DeviceIndex>(count); }
void pretend_set_device(int index) { current_ = static_cast<DeviceIndex>(index); }
int pretend_current_device() { return current_; }
void pretend_synchronize() { DeviceGuard::wait(); }
void pretend_listen(Listener listener) { listener_ = listener; }
int64_t pretend_allocated(int index) { return allocated_[index]; }
int64_t pretend_peak(int index) { return peak_[index]; }
void pretend_reset_peak(int index) { peak_[index] = allocated_[index].load(); }
const char* pretend_operators() {
  static std::string text;
  std::lock_guard<std::mutex> guard(operators_lock_);
  text.clear();
  for (const auto& name : operators_) text += name + "\n";
  return text.c_str();
}
}
