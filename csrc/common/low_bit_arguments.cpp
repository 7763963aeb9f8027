#include "low_bit_arguments.h"

#include "formulas.h"

namespace sama {
namespace {

std::string at(const std::string& list, size_t index) { return Name(list.c_str(), int64_t(index)).text(); }

void add_moments(const char* op, TensorLists& operands, const std::string (&names)[3], const StoredMoments& moments) {
  operands.add_in_row_major_order(names[kCodes].c_str(), moments.codes, aoti_torch_dtype_uint8(), "uint8");
  operands.add_in_row_major_order(names[kScales].c_str(), moments.scales, aoti_torch_dtype_float32(), "float32");
  operands.add_in_row_major_order(names[kLookup].c_str(), moments.tables, aoti_torch_dtype_float32(), "float32");
}

void check_numbers(
    const char* op, const TensorLists& operands, const std::string (&names)[3], const StoredMoments& moments,
    int64_t entries, int64_t block_size) {
  for (size_t i = 0; i < moments.codes.size(); ++i) {
    const int64_t numel = operands.numel(int64_t(i)), found = moments.tables[i].numel();
    const int64_t bytes = entries == kPackedCodes ? (numel + 1) / 2 : numel;
    const int64_t blocks = (numel + block_size - 1) / block_size;
    if (found != kByteCodes && found != kPackedCodes)
      fail(op, at(names[kLookup], i) + " must have 256 entries, or 16 for codes of 4 bits, not " + std::to_string(found));
    if (found != entries)
      fail(op, at(names[kLookup], i) + " has " + std::to_string(found) + " entries, but exp_avg_tables[0] has " +
                   std::to_string(entries));
    if (moments.codes[i].numel() != bytes)
      fail(op, at(names[kCodes], i) + " has " + std::to_string(moments.codes[i].numel()) + " bytes, but " + at("v", i) +
                   " needs " + std::to_string(bytes));
    if (moments.scales[i].numel() != blocks)
      fail(op, at(names[kScales], i) + " has " + std::to_string(moments.scales[i].numel()) + " numbers, but " +
                   at("v", i) + " has " + std::to_string(blocks) + " blocks of " + std::to_string(block_size));
  }
}

} // namespace

bool add_low_bit_lists(
    const char* op, TensorLists& operands, const TensorList& v, const TensorList& grads, const StoredMoments& m,
    const StoredMoments& w, const TensorList& steps, int64_t block_size, int64_t mode) {
  static const std::string m_names[] = {"exp_avg_codes", "exp_avg_scales", "exp_avg_tables"};
  static const std::string w_names[] = {"exp_avg_sq_codes", "exp_avg_sq_scales", "exp_avg_sq_tables"};
  if (v.empty()) fail(op, "v is empty");
  if (mode != kPaper && mode != kExact) fail(op, "mode must be 0 (paper) or 1 (exact), not " + std::to_string(mode));
  if (block_size < 1 || block_size > kMostPerScale)
    fail(op, "block_size must be from 1 to 2^30, not " + std::to_string(block_size));
  if (steps.size() != v.size())
    fail(op, "steps has " + std::to_string(steps.size()) + " tensors, but v has " + std::to_string(v.size()));
  operands.add("v", v, /*written=*/true);
  operands.add("grads", grads);
  add_moments(op, operands, m_names, m);
  add_moments(op, operands, w_names, w);
  const int64_t entries = m.tables[0].numel();
  check_numbers(op, operands, m_names, m, entries, block_size);
  check_numbers(op, operands, w_names, w, entries, block_size);
  return entries == kPackedCodes;
}

} // namespace sama
