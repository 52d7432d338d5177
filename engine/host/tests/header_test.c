/* The header alone, as C99: what a program can do without any backend. */

#include <stdio.h>
#include <string.h>

#include "meancache_trt.h"

static int failures = 0;

static void expect(int is_true, const char* behaviour) {
  if (!is_true) {
    fprintf(stderr, "FAILED: %s\n", behaviour);
    ++failures;
  }
}

static void null_is_refused_or_allowed(void) {
  mct_bundle* bundle = NULL;
  mct_session* session = NULL;
  mct_bundle_options options = {.struct_size = sizeof options};
  mct_bundle_destroy(NULL);
  mct_session_destroy(NULL);
  expect(mct_bundle_open(NULL, &bundle) == MCT_INPUT_ERROR, "no options");
  expect(mct_bundle_open(&options, NULL) == MCT_INPUT_ERROR, "no place for the bundle");
  expect(mct_bundle_open(&options, &bundle) == MCT_INPUT_ERROR, "no path");
  expect(strstr(mct_last_error(), "found NULL") != NULL, "it is said");
  expect(mct_session_create(NULL, NULL, &session) == MCT_INPUT_ERROR, "no bundle");
  expect(mct_session_run(NULL, NULL) == MCT_INPUT_ERROR, "no session");
  expect(mct_session_wait(NULL) == MCT_INPUT_ERROR, "nothing to wait for");
  expect(mct_session_read_latent(NULL, NULL, 0, MCT_HOST) == MCT_INPUT_ERROR, "nothing to read");
  expect(mct_session_decode(NULL, NULL) == MCT_INPUT_ERROR, "nothing to decode");
}

/* What a program of a later version passes: more fields than this library knows. */
struct later_options {
  mct_bundle_options known;
  int more;
};

static void structures_of_other_versions_are_told_apart(void) {
  mct_bundle* bundle = NULL;
  struct later_options later;
  memset(&later, 0, sizeof later);
  later.known.path = "/nowhere";
  later.known.struct_size = 4;
  expect(mct_bundle_open(&later.known, &bundle) == MCT_INPUT_ERROR, "too short");
  expect(strstr(mct_last_error(), "struct_size of 4") != NULL, "it is said");
  later.known.struct_size = sizeof later;
  expect(mct_bundle_open(&later.known, &bundle) == MCT_BUNDLE_ERROR, "longer, but zero");
  later.more = 1;
  expect(mct_bundle_open(&later.known, &bundle) == MCT_INPUT_ERROR, "longer, and asking");
  expect(strstr(mct_last_error(), "later version") != NULL, "it is said");
}

int main(void) {
  char version[32];
  snprintf(version, sizeof version, "%d.%d.%d", MCT_VERSION_MAJOR, MCT_VERSION_MINOR,
           MCT_VERSION_PATCH);
  expect(strcmp(mct_version(), version) == 0, "header and library are of one version");
  expect(mct_backends() != NULL && mct_last_error() != NULL, "texts are never NULL");
  null_is_refused_or_allowed();
  structures_of_other_versions_are_told_apart();
  return failures == 0 ? 0 : 1;
}
