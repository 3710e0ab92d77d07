/* What fastbptt calls of CUDA's driver, as far as it can be told without a GPU. A kernel is its letter. */
#include <string.h>

static void* current = (void*)0x77;
int fails_with = 0;
int launches = 0;
void* last_stream = 0;

int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}
int cuCtxSetCurrent(void* context) { return context == (void*)0x77 ? 0 : 201; }
int cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\x7f" "ELF", 4) != 0) return 200;
  *module = (void*)0x1234567890;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != (void*)0x1234567890 || strncmp(name, "fastbptt_", 9) != 0) return 500;
  *function = strncmp(name, "fastbptt_cell_", 14) == 0 ? (void*)(long)name[14] : (void*)(long)'p';
  return 0;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void* stream, void** arguments, void** extra) {
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra || !arguments) return 1;
  if (function != (void*)'f' && function != (void*)'b') return 400;
  if (grid_x == 0 || block_x == 0 || shared_bytes != 0) return 1;
  ++launches;
  last_stream = stream;
  return fails_with;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "an illegal memory access was encountered" : 0;
  return *text ? 0 : 1;
}
