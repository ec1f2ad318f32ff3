// Runs an artefact of bitwright without Python: a batch of raw inputs in, one class a line out.
//
//   ./classify FOLDER INPUTS.raw
//
// INPUTS.raw holds any number of inputs, one after the other, in the element type and layout that
// manifest.json names; the first axis of the model's input counts them.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
using ffi::Tensor;

constexpr int kPooledAllocator = 2;  // as in tvm/runtime/memory/memory_manager.h

// The compiled code reads whole vectors and relies on their alignment.
struct AlignedMemory {
  static constexpr size_t kAlignment = 64;

  void AllocData(DLTensor* tensor) {
    const size_t size = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, size);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

std::string ReadFile(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(stream), {}};
}

// One array out of the file: all axes but the first are fixed by the manifest.
Tensor ReadInput(const ffi::json::Object& described, const std::string& path) {
  if (described["dtype"].cast<ffi::String>() != "float32") {
    throw std::runtime_error("this program feeds float32 only");
  }
  std::vector<int64_t> shape{1};
  const auto axes = described["shape"].cast<ffi::json::Array>();
  int64_t values = 1;
  for (size_t axis = 1; axis < axes.size(); ++axis) {
    shape.push_back(axes[axis].cast<int64_t>());
    values *= shape.back();
  }
  const std::string content = ReadFile(path);
  const size_t bytes = values * sizeof(float);
  if (content.empty() || content.size() % bytes != 0) {
    throw std::runtime_error(path + ": its size is no multiple of " + std::to_string(bytes));
  }
  shape[0] = content.size() / bytes;
  Tensor input = Tensor::FromNDAlloc(AlignedMemory(), ffi::Shape(shape),
                                     DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  std::memcpy(input.data_ptr(), content.data(), content.size());
  return input;
}

int main(int count, char** words) try {
  if (count != 3) throw std::runtime_error("usage: classify FOLDER INPUTS.raw");
  const std::string folder = words[1];
  const auto manifest =
      ffi::json::Parse(ReadFile(folder + "/manifest.json")).cast<ffi::json::Object>();
  const auto inputs = manifest["inputs"].cast<ffi::json::Array>();
  if (inputs.size() != 1) throw std::runtime_error("this program feeds models with one input");
  const Tensor input = ReadInput(inputs[0].cast<ffi::json::Object>(), words[2]);

  // The library holds code only.
  const ffi::Module library = ffi::Module::LoadFromFile(folder + "/model.so");
  const auto machine =
      library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooledAllocator);

  // The weights lie beside it, packed. They are brought into the layout of the kernels once.
  const auto packed = ffi::Function::GetGlobalRequired("runtime.LoadParamsFromFile")(
                          folder + "/model.params")
                          .cast<ffi::Map<ffi::String, ffi::Any>>();
  ffi::Array<ffi::Any> in_order;
  for (const auto& [name, value] : packed) in_order.push_back(value);
  const auto weights = machine->GetFunction("main_transform_params").value()(in_order)
                           .cast<ffi::Array<ffi::Any>>();

  std::vector<ffi::AnyView> arguments{input};
  for (const auto& value : weights) arguments.emplace_back(value);
  ffi::Any result;
  machine->GetFunction("main").value().CallPacked(arguments.data(), arguments.size(), &result);

  const Tensor scores = result.cast<Tensor>();
  const int64_t classes = scores.size(scores.ndim() - 1);
  const float* first = static_cast<const float*>(scores.data_ptr());
  for (const float* row = first; row != first + scores.numel(); row += classes) {
    std::cout << std::max_element(row, row + classes) - row << '\n';
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 1;
}
