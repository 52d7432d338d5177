/* A stand-in for NVIDIA's libcuda.so.1: one device, described by macros, or a driver that hangs. */
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#ifndef MAJOR
#define MAJOR 8
#endif
#ifndef MINOR
#define MINOR 9
#endif
#ifndef STATUS
#define STATUS 0
#endif

enum { MAJOR_ATTRIBUTE = 75, MINOR_ATTRIBUTE = 76, GIB = 1 << 30 };

int cuInit(unsigned flags) {
#ifdef HANGS
  sleep(600);
#endif
  return STATUS + (int)flags;
}

int cuDriverGetVersion(int* version) {
  *version = 13010;
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}

int cuDeviceGet(int* device, int index) {
  *device = 7 + index; /* a handle is not an index */
  return 0;
}

int cuDeviceGetName(char* name, int length, int device) {
  strncpy(name, device == 7 ? "Fake GPU" : "wrong handle", (size_t)length);
  return 0;
}

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  *bytes = device == 7 ? 24ull * GIB : 0;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = NULL;
  return device != 7;
}

int cuCtxSetCurrent(void* context) { return context != NULL; }

int cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = 20ull * GIB;
  *total_bytes = 24ull * GIB;
  return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return device != 7; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == MAJOR_ATTRIBUTE ? MAJOR : attribute == MINOR_ATTRIBUTE ? MINOR : -1;
  return device != 7;
}
