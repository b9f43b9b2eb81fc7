// Segments a video without Python, with the programs that `python -m interpreter.export RUN --format aoti` writes:
//
//   ffmpeg -i clip.mp4 -vf scale=192:128:flags=bilinear -pix_fmt rgb24 -f rawvideo - | ./segment programs 22 out
//
// Arguments: the folder of the programs, the number of image slots of a frame, and a folder for the label maps.
// Standard input contains the frames as raw RGB, in the size that the run was exported for (ffmpeg's scale takes
// width:height). out/00000.pgm … are grey pictures of that size; the value of a pixel is its segment, counted from 0.

#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

namespace fs = std::filesystem;
using Tensors = std::vector<at::Tensor>;

struct Program {
  explicit Program(const fs::path& folder, const std::string& name)
      : loader(existing(folder / (name + ".aoti.pt2"))), metadata(loader.get_metadata()) {}

  static std::string existing(const fs::path& file) {
    if (!fs::exists(file)) throw std::runtime_error("no " + file.string() + "; export the run with --format aoti");
    return file.string();
  }

  // The shape of an input such as "4 T N 192", with sizes for its open dimensions.
  std::vector<int64_t> shape(const std::string& input, const std::map<std::string, int64_t>& open) {
    std::istringstream words(metadata.at(input));
    std::vector<int64_t> sizes;
    for (std::string word; words >> word;) {
      const auto found = open.find(word);
      sizes.push_back(found == open.end() ? std::stoll(word) : found->second);
    }
    return sizes;
  }

  Tensors run(const Tensors& inputs) { return loader.run(inputs); }

  torch::inductor::AOTIModelPackageLoader loader;
  std::unordered_map<std::string, std::string> metadata;
};

static at::Tensor read_frames(std::istream& stream, std::vector<int64_t> shape) {
  const auto size = shape[1] * shape[2] * 3;
  std::vector<char> bytes(std::istreambuf_iterator<char>(stream), {});
  if (bytes.empty() || bytes.size() % size != 0) {
    throw std::runtime_error(
        "standard input has " + std::to_string(bytes.size()) + " bytes, expected a whole number of RGB frames of " +
        std::to_string(shape[2]) + "x" + std::to_string(shape[1]) + "; let ffmpeg scale the frames to that size");
  }
  shape[0] = static_cast<int64_t>(bytes.size()) / size;
  return torch::from_blob(bytes.data(), shape, torch::kUInt8).clone();
}

static void write_maps(const at::Tensor& labels, const fs::path& out) {
  fs::create_directories(out);
  for (int64_t frame = 0; frame < labels.size(0); ++frame) {
    const auto map = labels[frame].to(torch::kUInt8).contiguous();
    char name[16];
    std::snprintf(name, sizeof name, "%05d.pgm", static_cast<int>(frame));
    std::ofstream file(out / name, std::ios::binary);
    file << "P5\n" << map.size(1) << " " << map.size(0) << "\n255\n";
    file.write(static_cast<const char*>(map.const_data_ptr()), map.numel());
    if (!file.flush()) throw std::runtime_error("cannot write " + (out / name).string());
  }
}

static void segment(const fs::path& folder, int64_t slots, const fs::path& out) {
  const c10::InferenceMode no_gradients;
  Program backbone(folder, "backbone"), image(folder, "image_stage"), labels(folder, "labels");
  const auto frames = read_frames(std::cin, backbone.shape("frames", {{"T", 0}}));
  const auto features = backbone.run({frames})[0];
  torch::manual_seed(0);  // the slots of each frame and of the video start from random draws
  const auto draws = torch::randn(image.shape("noise", {{"T", frames.size(0)}, {"N", slots}}));
  const auto found = image.run({features, draws});  // slots, attention, means
  auto masks = found[1];
  if (fs::exists(folder / "video_stage.aoti.pt2")) {  // else each frame is segmented by itself
    Program video(folder, "video_stage");
    const auto& inputs = video.metadata.count("slots") ? found[0] : found[2];
    masks = video.run({inputs, masks, torch::randn(video.shape("noise", {}))})[3];
  }
  write_maps(labels.run({masks})[0], out);
  std::cout << frames.size(0) << " frames, " << masks.size(2) << " segments: " << out.string() << "\n";
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: ffmpeg … -pix_fmt rgb24 -f rawvideo - | segment PROGRAMS SLOTS OUT\n";
    return 2;
  }
  try {
    segment(arguments[1], std::stoll(arguments[2]), arguments[3]);
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
