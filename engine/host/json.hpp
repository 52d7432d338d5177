// Strict JSON: what a file may hold is asked for by name, and anything else is refused.
//
// nlohmann_json reads the text, in json.cpp alone: its header takes longer to compile than all of
// this library. Messages are those of msgspec, which the Python host decodes with.

#ifndef MEANCACHE_TRT_HOST_JSON_HPP
#define MEANCACHE_TRT_HOST_JSON_HPP

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mct {

// One JSON value. Numbers without a fraction or exponent are integers, others are not.
struct JsonValue {
  enum class Kind { null, boolean, integer, number, text, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  std::int64_t integer = 0;
  double number = 0;  // of an integer too
  std::string text;
  std::vector<JsonValue> items;
  std::vector<std::pair<std::string, JsonValue>> members;  // in the order of the text

  // The last member of that name, as Python takes it; null where there is none.
  const JsonValue* find(std::string_view name) const;
};

// The text is not JSON.
class JsonSyntaxError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The text is JSON, but not of the fields and types that were asked for.
class JsonTypeError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws JsonSyntaxError; nesting is limited, so that no text exhausts the stack.
JsonValue parse_json(std::string_view text);

// A value and where it is in its file. Every conversion throws JsonTypeError for another type.
class Json {
 public:
  explicit Json(const JsonValue& value) : value_(&value), path_("$") {}

  bool is_null() const { return value_->kind == JsonValue::Kind::null; }
  const JsonValue& value() const { return *value_; }

  const std::string& text() const;
  std::int64_t integer() const;
  double number() const;  // takes integers too
  bool boolean() const;
  std::vector<Json> array() const;
  std::vector<Json> array(std::size_t length) const;
  std::vector<std::pair<std::string, Json>> members() const;
  // One of the texts, by its index.
  std::size_t choice(const std::vector<std::string>& texts) const;

  [[noreturn]] void fail(const std::string& fault) const;

 private:
  friend class JsonObject;
  Json(const JsonValue& value, std::string path, bool is_nullable = false)
      : value_(&value), path_(std::move(path)), is_nullable_(is_nullable) {}
  void expect(JsonValue::Kind kind, const char* name) const;

  const JsonValue* value_;
  std::string path_;
  bool is_nullable_ = false;
};

// The members of an object, each asked for once; `close` refuses what was not.
class JsonObject {
 public:
  explicit JsonObject(const Json& json);

  Json required(const char* name);
  // Nothing where the member is absent.
  std::optional<Json> optional(const char* name);
  // Nothing where the member is absent or null; required ones must be there.
  std::optional<Json> nullable(const char* name);
  std::optional<Json> required_nullable(const char* name);
  void close() const;

 private:
  const JsonValue* find(const char* name);
  Json at(const char* name, const JsonValue& value, bool is_nullable) const;

  Json json_;
  std::vector<const char*> asked_;
};

// Lists and tables of whatever `read` makes of a value.
template <class Read>
auto list_of(const Json& json, Read read) -> std::vector<decltype(read(json))> {
  std::vector<decltype(read(json))> values;
  for (const Json& item : json.array()) {
    values.push_back(read(item));
  }
  return values;
}

template <class Read>
auto table_of(const Json& json, Read read) -> std::map<std::string, decltype(read(json))> {
  std::map<std::string, decltype(read(json))> values;
  for (const auto& [name, value] : json.members()) {
    values.insert_or_assign(name, read(value));
  }
  return values;
}

inline std::int64_t to_integer(const Json& json) { return json.integer(); }
inline double to_number(const Json& json) { return json.number(); }
inline std::string to_text(const Json& json) { return json.text(); }

// `read` of the value, or nothing where there is none.
template <class Read>
auto maybe(const std::optional<Json>& json, Read read) -> std::optional<decltype(read(*json))> {
  if (!json) {
    return std::nullopt;
  }
  return read(*json);
}

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_JSON_HPP
