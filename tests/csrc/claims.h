// A check program of named claims: `program NAME` runs one and exits with 0 if it holds.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

struct Claim {
  const char* name;
  void (*run)();
};

#define CLAIM(name)                                    \
  static void name();                                  \
  static const Registered name##_claim({#name, name}); \
  static void name()

// Ends the program with the line, the condition and a printf message if it does not hold.
#define EXPECT(condition, ...)                            \
  do {                                                    \
    if (!(condition)) {                                   \
      std::printf("line %d: %s: ", __LINE__, #condition); \
      std::printf(__VA_ARGS__);                           \
      std::printf("\n");                                  \
      std::exit(1);                                       \
    }                                                     \
  } while (false)

constexpr int MAX_CLAIMS = 64;
static Claim all_claims[MAX_CLAIMS];
static int claim_count = 0;

struct Registered {
  explicit Registered(const Claim& claim) { all_claims[claim_count++] = claim; }
};

int main(int count, char** arguments) {
  for (int i = 0; i < claim_count; ++i) {
    if (count == 2 && std::strcmp(arguments[1], all_claims[i].name) == 0) {
      all_claims[i].run();
      return 0;
    }
  }
  std::printf("usage: %s NAME OF A CLAIM\n", arguments[0]);
  return 2;
}
