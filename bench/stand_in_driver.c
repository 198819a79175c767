/* Replaces NVIDIA's driver library without a GPU: the functions that Triton's launchers call, each of which returns at once. No
   kernel runs. Pointers are not checked, so CPU tensors pass for a GPU's. */
#include <stddef.h>

typedef int Result;
typedef unsigned long long Address;

enum { SUCCESS = 0 };
/* The driver's numbers of attributes. */
enum { SHARED_PER_BLOCK = 8, WARP_SIZE = 10, MULTIPROCESSORS = 16, SHARED_OPT_IN = 97 };
enum { MAX_THREADS = 0, STATIC_SHARED = 1, LOCAL_BYTES = 3 };

static unsigned long long made;

/* Launches since the library was loaded. */
unsigned long long stand_in_launches(void) { return made; }

Result cuInit(unsigned flags) { (void)flags; return SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuGetErrorString(Result code, const char **text) { (void)code; *text = "no error is known to the stand-in"; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
Result cuDeviceGet(int *device, int index) { *device = index; return SUCCESS; }

/* The attributes of an H100 that Triton reads. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case SHARED_OPT_IN: *value = 232448; break;
    case SHARED_PER_BLOCK: *value = 49152; break;
    case MULTIPROCESSORS: *value = 132; break;
    case WARP_SIZE: *value = 32; break;
    default: *value = 65536;
    }
    return SUCCESS;
}

Result cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
Result cuCtxSetCurrent(void *context) { (void)context; return SUCCESS; }
Result cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
Result cuCtxGetLimit(size_t *value, int limit) { (void)limit; *value = 0; return SUCCESS; }
Result cuCtxSetLimit(int limit, size_t value) { (void)limit; (void)value; return SUCCESS; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return SUCCESS; }

Result cuModuleLoadData(void **module, const void *image) { (void)image; *module = (void *)1; return SUCCESS; }
Result cuModuleUnload(void *module) { (void)module; return SUCCESS; }
Result cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module; (void)name;
    *function = (void *)1;
    return SUCCESS;
}
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    (void)function;
    *value = attribute == MAX_THREADS ? 1024 : attribute == STATIC_SHARED || attribute == LOCAL_BYTES ? 0 : 64;
    return SUCCESS;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { (void)function; (void)attribute; (void)value; return SUCCESS; }
Result cuFuncSetCacheConfig(void *function, int preference) { (void)function; (void)preference; return SUCCESS; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
    (void)function; (void)config;
    *count = 1;
    return SUCCESS;
}
Result cuStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }

Result cuPointerGetAttribute(void *data, int attribute, Address pointer) {
    (void)attribute;
    *(Address *)data = pointer;
    return SUCCESS;
}

Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
    (void)config; (void)function; (void)parameters; (void)extra;
    made++;
    return SUCCESS;
}

/* The launchers link to these, but our kernels do not call them. 801 is the driver's "not supported". */
Result cuTensorMapEncodeTiled(void) { return 801; }
Result cuTensorMapEncodeIm2col(void) { return 801; }
