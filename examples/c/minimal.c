/* Render one picture in C: a bundle with text encoders, token ids all zero, a PPM on stdout.
 *
 * usage: minimal BUNDLE > picture.ppm
 */

#include <stdio.h>
#include <stdlib.h>

#include "meancache_trt.h"

static int failed(const char* what) {
  fprintf(stderr, "%s: %s\n", what, mct_last_error());
  return 1;
}

/* Feed every tensor of conditioning with zeros: no prompt, but a whole run. */
static mct_status set_nothing(mct_session* session) {
  mct_session_info info = {.struct_size = sizeof info};
  mct_status status = mct_session_get_info(session, &info);
  for (size_t index = 0; status == MCT_OK && index < info.conditioning_count; ++index) {
    mct_tensor tensor = {.struct_size = sizeof tensor};
    status = mct_session_get_conditioning(session, index, &tensor);
    void* zeros = calloc(1, tensor.size_bytes);
    if (status == MCT_OK) {
      status =
          mct_session_set_conditioning(session, tensor.name, zeros, tensor.size_bytes, MCT_HOST);
    }
    free(zeros);
  }
  return status;
}

static int render(mct_session* session) {
  const uint64_t seed = 7;
  mct_session_info info = {.struct_size = sizeof info};
  mct_run_options running = {.struct_size = sizeof running};
  mct_decode_options decoding = {.struct_size = sizeof decoding};
  uint8_t* rgb = NULL;
  int result = 1;
  if (mct_session_get_info(session, &info) || set_nothing(session)) {
    return failed("conditioning");
  }
  running.seeds = &seed;
  running.seed_count = 1;
  rgb = malloc(info.image_count);
  decoding.rgb = rgb;
  decoding.rgb_count = info.image_count;
  if (rgb == NULL || mct_session_run(session, &running) || mct_session_decode(session, &decoding)) {
    failed("rendering");
  } else {
    printf("P6\n%d %d\n255\n", (int)info.width, (int)info.height);
    result = fwrite(rgb, 3, (size_t)(info.width * info.height), stdout) == 0;
  }
  free(rgb);
  return result;
}

int main(int count, char** arguments) {
  mct_bundle_options opening = {.struct_size = sizeof opening};
  mct_session_options options = {.struct_size = sizeof options};
  mct_bundle* bundle = NULL;
  mct_session* session = NULL;
  int result = 1;
  if (count != 2) {
    fprintf(stderr, "usage: minimal BUNDLE > picture.ppm\n");
    return 2;
  }
  opening.path = arguments[1];
  if (mct_bundle_open(&opening, &bundle)) {
    failed("opening the bundle");
  } else if (mct_session_create(bundle, &options, &session)) {
    failed("making a session");
  } else {
    result = render(session);
  }
  mct_session_destroy(session);
  mct_bundle_destroy(bundle);
  return result;
}
