// Linked behind the kernels, as a thread-local object behind their __shared__ ones; see
// emulator.cpp.
namespace emulator {

unsigned char* end_of_shared_memory() {
  static thread_local unsigned char here;
  return &here;
}

}  // namespace emulator
