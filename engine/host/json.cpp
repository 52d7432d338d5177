#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace mct {

namespace {

using Kind = JsonValue::Kind;

constexpr std::size_t deepest = 64;  // our files nest to 7; freeing a value recurses

// Builds a JsonValue from nlohmann's events.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  JsonValue root;
  std::string fault;

  bool null() override { return add({}); }
  bool boolean(bool value) override { return add(of(Kind::boolean, value, 0, 0, {})); }
  bool number_integer(number_integer_t value) override {
    return add(of(Kind::integer, false, value, static_cast<double>(value), {}));
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<number_unsigned_t>(std::numeric_limits<std::int64_t>::max())) {
      return refuse("Integer value out of range");
    }
    return number_integer(static_cast<number_integer_t>(value));
  }
  bool number_float(number_float_t value, const string_t& text) override {
    if (!std::isfinite(value)) {
      return refuse("Number out of range: " + text);
    }
    return add(of(Kind::number, false, 0, value, {}));
  }
  bool string(string_t& value) override { return add(of(Kind::text, false, 0, 0, value)); }
  bool binary(binary_t& /*value*/) override { return refuse("binary values are no JSON"); }
  bool start_object(std::size_t /*size*/) override { return open(Kind::object); }
  bool key(string_t& name) override {
    open_.back()->members.emplace_back(name, JsonValue{});
    return true;
  }
  bool end_object() override { return close(); }
  bool start_array(std::size_t /*size*/) override { return open(Kind::array); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::json::exception& error) override {
    const std::string text = error.what();
    const bool is_short = text.find("unexpected end of input") != std::string::npos;
    return refuse(is_short ? "Input data was truncated"
                           : "JSON is malformed (byte " + std::to_string(position) + ")");
  }

 private:
  static JsonValue of(Kind kind, bool boolean, std::int64_t integer, double number,
                      std::string text) {
    JsonValue value;
    value.kind = kind;
    value.boolean = boolean;
    value.integer = integer;
    value.number = number;
    value.text = std::move(text);
    return value;
  }

  bool refuse(std::string text) {
    fault = std::move(text);
    return false;
  }

  // Where the next value goes: the root, a new item, or the member whose name was read.
  JsonValue& target() {
    if (open_.empty()) {
      return root;
    }
    JsonValue& parent = *open_.back();
    return parent.kind == Kind::array ? parent.items.emplace_back() : parent.members.back().second;
  }

  bool add(JsonValue value) {
    target() = std::move(value);
    return true;
  }

  bool open(Kind kind) {
    if (open_.size() == deepest) {
      return refuse("JSON is nested too deeply");
    }
    JsonValue& value = target();
    value = {};
    value.kind = kind;
    open_.push_back(&value);  // stays put: its siblings are added only after it is closed
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  std::vector<JsonValue*> open_;
};

const char* name_of(Kind kind) {
  constexpr const char* names[] = {"null", "bool", "int", "float", "str", "array", "object"};
  return names[static_cast<std::size_t>(kind)];
}

}  // namespace

const JsonValue* JsonValue::find(std::string_view name) const {
  const auto found = std::find_if(members.rbegin(), members.rend(),
                                  [&](const auto& member) { return member.first == name; });
  return found == members.rend() ? nullptr : &found->second;
}

JsonValue parse_json(std::string_view text) {
  Builder builder;
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) {
    throw JsonSyntaxError(builder.fault.empty() ? "JSON is malformed" : builder.fault);
  }
  return std::move(builder.root);
}

void Json::fail(const std::string& fault) const {
  throw JsonTypeError(path_ == "$" ? fault : fault + " - at `" + path_ + "`");
}

void Json::expect(Kind kind, const char* name) const {
  if (value_->kind != kind) {
    fail(std::string("Expected `") + name + (is_nullable_ ? " | null" : "") + "`, got `" +
         name_of(value_->kind) + "`");
  }
}

const std::string& Json::text() const {
  expect(Kind::text, "str");
  return value_->text;
}

std::int64_t Json::integer() const {
  expect(Kind::integer, "int");
  return value_->integer;
}

double Json::number() const {
  if (value_->kind != Kind::integer) {
    expect(Kind::number, "float");
  }
  return value_->number;
}

bool Json::boolean() const {
  expect(Kind::boolean, "bool");
  return value_->boolean;
}

std::vector<Json> Json::array() const {
  expect(Kind::array, "array");
  std::vector<Json> values;
  values.reserve(value_->items.size());
  for (std::size_t k = 0; k < value_->items.size(); ++k) {
    values.push_back(Json(value_->items[k], path_ + "[" + std::to_string(k) + "]"));
  }
  return values;
}

std::vector<Json> Json::array(std::size_t length) const {
  expect(Kind::array, "array");
  if (value_->items.size() != length) {
    fail("Expected `array` of length " + std::to_string(length));
  }
  return array();
}

std::vector<std::pair<std::string, Json>> Json::members() const {
  expect(Kind::object, "object");
  std::vector<std::pair<std::string, Json>> values;
  for (const auto& [name, value] : value_->members) {
    values.emplace_back(name, Json(value, path_ + "[...]"));
  }
  return values;
}

std::size_t Json::choice(const std::vector<std::string>& texts) const {
  const auto found = std::find(texts.begin(), texts.end(), text());
  if (found == texts.end()) {
    fail("Invalid enum value '" + value_->text + "'");
  }
  return static_cast<std::size_t>(found - texts.begin());
}

JsonObject::JsonObject(const Json& json) : json_(json) { json_.expect(Kind::object, "object"); }

const JsonValue* JsonObject::find(const char* name) {
  asked_.push_back(name);
  return json_.value_->find(name);
}

Json JsonObject::at(const char* name, const JsonValue& value, bool is_nullable) const {
  return Json(value, json_.path_ + "." + name, is_nullable);
}

Json JsonObject::required(const char* name) {
  const JsonValue* value = find(name);
  if (value == nullptr) {
    json_.fail(std::string("Object missing required field `") + name + "`");
  }
  return at(name, *value, false);
}

std::optional<Json> JsonObject::optional(const char* name) {
  const JsonValue* value = find(name);
  return value == nullptr ? std::nullopt : std::optional<Json>(at(name, *value, false));
}

std::optional<Json> JsonObject::nullable(const char* name) {
  const JsonValue* value = find(name);
  const bool is_there = value != nullptr && value->kind != Kind::null;
  return is_there ? std::optional<Json>(at(name, *value, true)) : std::nullopt;
}

std::optional<Json> JsonObject::required_nullable(const char* name) {
  const Json json = required(name);
  return json.is_null() ? std::nullopt : std::optional<Json>(at(name, *json.value_, true));
}

void JsonObject::close() const {
  for (const auto& member : json_.value_->members) {
    const auto is_name = [&](const char* name) { return member.first == name; };
    if (std::none_of(asked_.begin(), asked_.end(), is_name)) {
      json_.fail("Object contains unknown field `" + member.first + "`");
    }
  }
}

}  // namespace mct
