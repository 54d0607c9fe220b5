// Linked before the kernels, as a thread-local object before their __shared__ ones; see
// emulator.cpp.
namespace emulator {

unsigned char* begin_of_shared_memory() {
  static thread_local unsigned char here;
  return &here + 1;
}

}  // namespace emulator
