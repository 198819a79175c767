// Lets fake tensors be on CUDA where there is no GPU. Autograd asks a device for its streams, of which this one has a single one,
// and the library of the device whether it is in use, which this one is not.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// The registry wants its classes in this namespace.
namespace at {
namespace {

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    static Stream stream() { return Stream(Stream::DEFAULT, Device(c10::DeviceType::CUDA, 0)); }
    Device exchangeDevice(Device) const override { return Device(c10::DeviceType::CUDA, 0); }
    Device getDevice() const override { return Device(c10::DeviceType::CUDA, 0); }
    Stream getStream(Device) const noexcept override { return stream(); }
    Stream getDefaultStream(Device) const override { return stream(); }
    Stream getNewStream(Device, int) const override { return stream(); }
    Stream exchangeStream(Stream) const noexcept override { return stream(); }
    void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
const c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard());

struct StandInHooks : CUDAHooksInterface {
    StandInHooks(CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return false; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
    int getNumGPUs() const override { return 1; }
    DeviceIndex current_device() const override { return 0; }
    long versionCuDNN() const override { return 0; }
    long versionRuntimeCuDNN() const override { return 0; }
};
// A torch that was built for CUDA has hooks of its own.
C10_REGISTER_TYPED_CREATOR_WITH_PRIORITY(
    CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, [](CUDAHooksArgs args) -> std::unique_ptr<CUDAHooksInterface> {
        return std::make_unique<StandInHooks>(args);
    })

}  // namespace
}  // namespace at
