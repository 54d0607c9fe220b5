// A CUDA device of which there is nothing but the name: PyTorch without a GPU differentiates fake
// tensors on it.
//
// Autograd asks a device for streams and events before it runs an operator there; on these nothing
// is ever queued. To be loaded before torch is imported: see fake_cuda.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <memory>

namespace {

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

// Fake tensors draw no numbers: of a generator only its device is asked.
struct Random : at::CPUGeneratorImpl {
  Random() { device_ = c10::Device(c10::DeviceType::CUDA, 0); }
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Random>();
  }
};

const Guard guard;

// Before those of a PyTorch with CUDA, which find no driver.
const bool registered = [] {
  const auto create = [](at::CUDAHooksArgs args) { return std::make_unique<Hooks>(args); };
  at::CUDAHooksRegistry()->Register("CUDAHooks", create, c10::REGISTRY_PREFERRED);
  return true;
}();

}  // namespace

// After torch is imported, which may have set a guard of its own.
extern "C" void fake_cuda_install() {
  c10::impl::DeviceGuardImplRegistrar(c10::DeviceType::CUDA, &guard);
}
