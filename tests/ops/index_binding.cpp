// csrc/index.h for Python, so that tests/ops/test_index.py tests the very lines the kernels use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "index.h"

namespace py = pybind11;
using namespace rfsr;

namespace {

// (index, weight) of the terms that count.
std::vector<std::pair<i64, int>> listed(const HaarTerms& terms) {
  std::vector<std::pair<i64, int>> list;
  for (int t = 0; t < 3; ++t)
    if (terms.has(t)) list.emplace_back(terms.index[t], terms.weight[t]);
  return list;
}

template <class Acc>
void bind_numbers(py::module_& m, const char* suffix) {
  const auto name = [&](const char* function) { return std::string(function) + suffix; };
  m.def(name("sign_code").c_str(), [](Acc d) { return static_cast<int>(sign_code(d)); });
  m.def(name("signed_value").c_str(), [](int code, Acc g) { return signed_value(static_cast<uint8_t>(code), g); });
  m.def(name("clamped").c_str(), [](Acc x, double low, double high) { return range_of<Acc>(low, high).clamped(x); });
  m.def(name("inside").c_str(), [](Acc x, double low, double high) { return range_of<Acc>(low, high).inside(x); });
}

}  // namespace

PYBIND11_MODULE(index_binding, m) {
  m.attr("modes") = static_cast<i64>(kHaarModes);
  m.def("haar_edge", [](i64 mode) {
    const HaarEdge edge = haar_edge(mode);
    return std::make_tuple(edge.last, edge.before, edge.first);
  });
  m.def("haar_size", haar_size);
  m.def("haar_pair", [](i64 i, i64 size, i64 mode) { return listed(haar_pair(i, size, haar_edge(mode))); });
  m.def("haar_users", [](i64 k, i64 size, i64 mode) { return listed(haar_users(k, size, haar_edge(mode))); });

  bind_numbers<float>(m, "_float");
  bind_numbers<double>(m, "_double");
  m.def("range_factor", range_factor);
  m.def("code_at", [](const std::string& row, i64 j) {
    return static_cast<int>(code_at(reinterpret_cast<const uint8_t*>(row.data()), j));
  });
  m.def("bit_at", [](const std::string& row, i64 k) {
    return bit_at(reinterpret_cast<const uint8_t*>(row.data()), k);
  });
  m.def("divisor", divisor);

  py::class_<Kept>(m, "Kept")
      .def(py::init([](i64 channels, i64 height, i64 width, int masks) {
        return Kept{channels, height, width, masks};
      }))
      .def("sample", &Kept::sample)
      .def("sign_bytes", &Kept::sign_bytes)
      .def("mask_bytes", &Kept::mask_bytes)
      .def("sign_row", &Kept::sign_row)
      .def("mask_row", &Kept::mask_row);

  m.def("pixel", [](std::vector<i64> size, std::vector<i64> stride, i64 k) {
    const Strided4 v{size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
    return std::make_tuple(v.pixel(k), v.flat(), v.pixels(), v.at(1, 1, 1, 1));
  });
  m.def("triangle", [](i64 t) {
    const TilePair tile = triangle(t);
    return std::make_pair(tile.i, tile.j);
  });
}
