#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace less_cache {

enum class Dtype : std::int32_t {
    kFloat32 = 0,
    kFloat16 = 1,
    kBFloat16 = 2,
    kInt32 = 3,
    kInt64 = 4,
    /// Bytes of codes: TensorRT gives plugins no uint8.
    kInt8 = 5
};

/// As the kernels' records and less_cache's configuration spell it.
const char* name_of(Dtype dtype);

/// Bytes a number.
std::int64_t size_of(Dtype dtype);

/// The score that a pair starts with: the numbers of `less_cache.policies.Start`.
enum class Start : std::int32_t { kZero = 0, kPosition = 1, kKeyNorm = 2 };

/// What it gains from the queries that see the pair: the numbers of `less_cache.policies.Gain`.
enum class Gain : std::int32_t { kNone = 0, kSum = 1, kHistory = 2 };

/// How many starts, and how many gains, there are.
constexpr std::int32_t kStarts = 3;
constexpr std::int32_t kGains = 3;

/// The kinds of feature maps, as the kernels number them.
enum class MapKind : std::int32_t { kNone = 0, kPaper = 1, kExp = 2 };

/// As the node's attribute spells it.
const char* name_of(MapKind kind);

/// The bases of codes, as the kernels number them; kNone where pairs are stored as they are.
enum class Transform : std::int32_t { kNone = -1, kHadamard = 0, kCalibrated = 1 };

/// As the node's attribute spells it; "" for none.
const char* name_of(Transform transform);

/// The node's attributes: a layer's policy, state and scale.
struct Attributes {
    Start start = Start::kZero;
    Gain gain = Gain::kNone;
    std::int32_t sinks = 0;
    std::int32_t recent = 0;
    float decay = 1.0F;
    std::int32_t window = 0;
    std::int32_t capacity = 1;
    std::int32_t rank = 0;
    MapKind maps = MapKind::kNone;
    float scale = 1.0F;
    /// 0 for none.
    float softcap = 0.0F;
    /// Of codes: "3" on average, or of each eighth of the channels, "6,4,4,3,3,2,2,0"; "0" where
    /// pairs are stored as they are.
    std::string key_bits = "0";
    std::string value_bits = "0";
    Transform transform = Transform::kNone;
    /// Of a layer with codes, whose queries do not tell it.
    Dtype model_dtype = Dtype::kFloat32;

    /// Whether pairs are stored as codes.
    [[nodiscard]] bool coded() const { return transform != Transform::kNone; }
    /// Whether slots hold scores: coded ones do not where a position tells its pair's.
    [[nodiscard]] bool keeps_scores() const {
        return !coded() || gain != Gain::kNone || start == Start::kKeyNorm;
    }
    /// Whether queries bring a shift, and ψ a bias: the basis has means, and a low-rank state
    /// must know.
    [[nodiscard]] bool shifted() const { return transform == Transform::kCalibrated && rank > 0; }
};

/// What the tensors add to the attributes.
struct Sizes {
    std::int32_t query_heads = 0;
    std::int32_t kv_heads = 0;
    std::int32_t head_dim = 0;
    /// Of the maps; 0 without.
    std::int32_t hidden = 0;
    /// The model's: of the maps' matrices, and, but for codes, of queries, keys, values and output.
    Dtype dtype = Dtype::kFloat32;
    /// Of H and z; meaningless at rank 0.
    Dtype state_dtype = Dtype::kFloat32;
    /// Of one pair's codes; 0 where pairs are stored as they are.
    std::int32_t key_bytes = 0;
    std::int32_t value_bytes = 0;
};

/// A layer: everything but the batch.
struct Layer {
    Attributes attributes;
    Sizes sizes;

    /// G, query heads a KV head.
    [[nodiscard]] std::int32_t group() const { return sizes.query_heads / sizes.kv_heads; }
    /// Whether scores are made of probabilities, which need every logit once more.
    [[nodiscard]] bool scored() const { return attributes.gain != Gain::kNone; }
    /// Of queries, new keys and values, and the output: in the basis of codes they are not
    /// narrowed.
    [[nodiscard]] Dtype token_dtype() const {
        return attributes.coded() ? Dtype::kFloat32 : sizes.dtype;
    }
    /// What one key, and one value, takes in its array: bytes of codes, or numbers.
    [[nodiscard]] std::int32_t key_width() const {
        return attributes.coded() ? sizes.key_bytes : sizes.head_dim;
    }
    [[nodiscard]] std::int32_t value_width() const {
        return attributes.coded() ? sizes.value_bytes : sizes.head_dim;
    }
};

/// A tensor that the node takes or gives.
struct Tensor {
    std::string name;
    Dtype dtype = Dtype::kFloat32;
    /// -1 stands for the batch.
    std::vector<std::int64_t> dims;
};

/// @throws Refusal naming the attribute, its value and what is allowed.
void check(const Attributes& attributes);

/// @throws Refusal naming the size, its value and what is allowed; attributes are checked too.
void check(const Layer& layer);

/// Names of the state's arrays, in the node's order.
std::vector<std::string> state_names(const Attributes& attributes);

/// Names of the node's inputs, in order: tokens, state, maps, shift.
std::vector<std::string> input_names(const Attributes& attributes);

/// The node's inputs with their shapes, in order.
std::vector<Tensor> inputs_of(const Layer& layer);

/// The node's outputs with their shapes, in order: `out`, then the state.
std::vector<Tensor> outputs_of(const Layer& layer);

/// Inputs before the state's arrays: q, k, v, mask, length.
constexpr std::int32_t kTokenInputs = 5;

/// The input that holds the same state array as output `index`; -1 for `out`.
std::int32_t aliased_input(std::int32_t index);

/// One line for people: policy, sizes and dtypes.
std::string describe(const Layer& layer);

}  // namespace less_cache
