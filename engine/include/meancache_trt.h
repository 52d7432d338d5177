/* meancache-trt: render flow-matching models with a baked schedule, from C or any language that
 * calls C.
 *
 *   mct_bundle* bundle = NULL;
 *   mct_session* session = NULL;
 *   mct_bundle_options opening = {.struct_size = sizeof opening};
 *   opening.path = "flux.mcb";
 *   mct_session_options options = {.struct_size = sizeof options};
 *   options.schedule = "b10";
 *   if (mct_bundle_open(&opening, &bundle) || mct_session_create(bundle, &options, &session)) {
 *     fprintf(stderr, "%s\n", mct_last_error());
 *   }
 *
 * Then, for each picture: mct_session_set_conditioning (or mct_session_set_token_ids),
 * mct_session_run, mct_session_decode. examples/c/minimal.c is a whole program.
 *
 * Conventions
 * - Every function that can fail returns a status, and mct_last_error() says what was expected,
 * what was found and what to do, in the words of the Python host. Nothing is thrown.
 * - A structure begins with its own size, which the caller sets, so that a library that knows more
 *   fields than the program still works; the rest is zero where a default is meant. A structure
 * that is larger than the library's is refused where the surplus is not zero.
 * - Sizes of arrays are given and checked: in elements where a name ends in _count, in bytes where
 *   it ends in _bytes. Arrays are row-major and without gaps; images have their channels last.
 * - Pointers must not be NULL unless it is said. Texts are UTF-8 and end with 0.
 * - What is passed in is copied before the function returns, unless it is said; texts that are
 *   returned belong to the handle and live as long.
 * - A bundle may be used from several threads at a time. A session may not: give each thread its
 *   own. Sessions of one bundle with the same backend, threads, device and concurrency share graphs
 *   and weights.
 * - C99 and C++17; no header of CUDA, TensorRT or OpenVINO is needed. A CUDA stream is a void*.
 */

#ifndef MEANCACHE_TRT_H
#define MEANCACHE_TRT_H

#include <stddef.h>
#include <stdint.h>

#if defined(MEANCACHE_TRT_STATIC)
#define MCT_API
#elif defined(_WIN32)
#if defined(MEANCACHE_TRT_BUILDS)
#define MCT_API __declspec(dllexport)
#else
#define MCT_API __declspec(dllimport)
#endif
#else
#define MCT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MCT_VERSION_MAJOR 0
#define MCT_VERSION_MINOR 1
#define MCT_VERSION_PATCH 0

/* The largest rank of any tensor. */
#define MCT_MAX_RANK 8

/* What went wrong; the names are those of the Python host's errors. */
typedef enum mct_status {
  MCT_OK = 0,
  MCT_SCHEDULE_ERROR = 1,            /* a schedule that is malformed, or does not fit its use */
  MCT_BUNDLE_ERROR = 2,              /* a bundle that is missing, damaged or lacks something */
  MCT_RUNTIME_UNAVAILABLE_ERROR = 3, /* a backend that is not compiled in, or has no device */
  MCT_PLAN_ERROR = 4,                /* a graph that the backend cannot build */
  MCT_PLAN_MISMATCH_ERROR = 5,       /* a plan for another GPU, library, graph or size */
  MCT_RENDER_ERROR = 6,              /* a render that produced no valid picture */
  MCT_INPUT_ERROR = 7,               /* an argument, option or file that cannot be used */
  MCT_CANCELLED = 8,                 /* the callback asked to stop; the session is usable */
  MCT_INTERNAL_ERROR = 9             /* out of memory, or a fault of this library */
} mct_status;

typedef enum mct_dtype {
  MCT_FLOAT32 = 1,
  MCT_FLOAT16 = 2,
  MCT_BFLOAT16 = 3,
  MCT_FLOAT64 = 4,
  MCT_INT32 = 5,
  MCT_INT64 = 6,
  MCT_BOOL = 7
} mct_dtype;

/* Where memory is. Device memory is taken by backends that run on a GPU; others refuse it. */
typedef enum mct_memory { MCT_HOST = 0, MCT_DEVICE = 1 } mct_memory;

/* How a guidance scale acts. */
typedef enum mct_guidance {
  MCT_GUIDANCE_NONE = 0,
  MCT_GUIDANCE_EMBEDDED = 1,       /* the network is fed the scale */
  MCT_GUIDANCE_CLASSIFIER_FREE = 2 /* prompts and negative prompts: twice the conditioning */
} mct_guidance;

typedef struct mct_bundle mct_bundle;
typedef struct mct_session mct_session;

/* ---- Library ------------------------------------------------------------------------------ */

/* The library's version, such as "0.1.0". Compare with the MCT_VERSION_ numbers of the header:
 * until 1.0 the first two have to be equal. */
MCT_API const char* mct_version(void);

/* The backends that this library was compiled with, such as "openvino", separated by commas; in the
 * order in which they are tried where none is named. Empty where there are none. */
MCT_API const char* mct_backends(void);

/* What the last call that failed in this thread says. Never NULL; valid until the next call that
 * fails in this thread. */
MCT_API const char* mct_last_error(void);

/* ---- Bundle ------------------------------------------------------------------------------- */

typedef struct mct_bundle_options {
  size_t struct_size;
  const char* path;  /* the directory */
  int is_full_check; /* not 0: hash weights even where their size and times are unchanged */
} mct_bundle_options;

/* Open a bundle and check its files: graphs and schedules are hashed each time, weights where their
 * inode, size or times differ from those of the last full hash (by this host or the Python one).
 * *bundle is set to NULL where it fails. Fails with MCT_BUNDLE_ERROR where the directory is no
 * bundle, or a file is missing or was altered. */
MCT_API mct_status mct_bundle_open(const mct_bundle_options* options, mct_bundle** bundle);

/* Free a bundle; NULL is allowed. Sessions keep what they need and may outlive it. */
MCT_API void mct_bundle_destroy(mct_bundle* bundle);

typedef struct mct_bundle_info {
  size_t struct_size;
  const char* bundle_id; /* SHA-256 over graphs and weights */
  const char* family;    /* such as "flux" */
  const char* model_name;
  const char* model_digest;
  mct_guidance guidance;
  int has_default_guidance_scale;
  double default_guidance_scale;
  size_t resolution_count; /* at least 1; the first is the default */
  size_t schedule_count;
  size_t conditioning_count; /* tensors of conditioning, masks among them */
  size_t text_encoder_count; /* text encoders that take token ids; 0: conditioning is given */
  int64_t text_tokens;
  double frames_per_second; /* of a video model; 0 for pictures */
  int has_space_tiling;     /* whether mct_decode_options.vae_tiling may be set */
} mct_bundle_info;

MCT_API mct_status mct_bundle_get_info(const mct_bundle* bundle, mct_bundle_info* info);

/* Shapes are those of one sample. */
typedef struct mct_resolution {
  size_t struct_size;
  int64_t height; /* pixels */
  int64_t width;  /* pixels */
  int64_t frames; /* 0 for pictures */
  size_t noise_rank;
  int64_t noise_shape[MCT_MAX_RANK]; /* (C, Hl, Wl), or (C, F, Hl, Wl) of a video */
  size_t latent_rank;
  int64_t latent_shape[MCT_MAX_RANK]; /* as the network takes it, such as (tokens, C) */
  size_t image_rank;
  int64_t image_shape[MCT_MAX_RANK]; /* (H, W, 3), or (frames, H, W, 3) of a video */
} mct_resolution;

/* `index` is below resolution_count. */
MCT_API mct_status mct_bundle_get_resolution(const mct_bundle* bundle, size_t index,
                                             mct_resolution* resolution);

typedef struct mct_schedule {
  size_t struct_size;
  const char* name;
  const char* method;    /* "fitted" or an analytic one */
  const char* precision; /* that it was calibrated in */
  int64_t budget;        /* B, network evaluations an image */
  int64_t steps;         /* T, of the full integration */
  int64_t history;       /* velocities that it reads back */
  int is_calibrated;     /* then it belongs to its grid, model, precision and guidance scale */
  int has_guidance_scale;
  double guidance_scale;
  int has_guidance_range;
  double guidance_low;
  double guidance_high;
} mct_schedule;

/* `index` is below schedule_count; those with most evaluations are first. */
MCT_API mct_status mct_bundle_get_schedule(const mct_bundle* bundle, size_t index,
                                           mct_schedule* schedule);

typedef struct mct_tensor {
  size_t struct_size;
  const char* name;
  mct_dtype dtype;
  size_t rank;
  int64_t shape[MCT_MAX_RANK];
  size_t size_bytes;
} mct_tensor;

/* A tensor of conditioning for one prompt, without a batch; `index` is below conditioning_count. */
MCT_API mct_status mct_bundle_get_conditioning(const mct_bundle* bundle, size_t index,
                                               mct_tensor* tensor);

/* The token ids that a text encoder takes of one prompt; `index` is below text_encoder_count. The
 * name is the encoder's. The ids are what pipeline/NAME's tokenizer.json makes of a prompt, cut and
 * padded. */
MCT_API mct_status mct_bundle_get_text_encoder(const mct_bundle* bundle, size_t index,
                                               mct_tensor* tensor);

/* ---- Session ------------------------------------------------------------------------------ */

typedef struct mct_session_options {
  size_t struct_size;
  const char* schedule; /* a name in the bundle, a budget such as "10", or the path of a .json file;
                           NULL: the bundle's largest calibrated one that fits, or its largest */
  const char* backend;  /* of mct_backends(); NULL: the first that runs here */
  int64_t height;       /* 0: of the first resolution that has the other two values */
  int64_t width;
  int64_t frames;
  int64_t batch;       /* pictures at a time; 0 means 1 */
  int64_t text_tokens; /* a text length below the bundle's; 0: the bundle's */
  int has_guidance_scale;
  double guidance_scale; /* else the schedule's own, or the model's default; of a model with two
                            transformers the first one's, where the bundle has a second */
  int threads;           /* cores that one graph may use, on a CPU; 0: all */
  int device;            /* index of the GPU */
  int concurrency; /* sessions of this bundle, with the same backend and threads, that run side
                      by side on a CPU; 0 means 1: others wait for their turn. Each takes scratch
                      memory of its own, weights are shared */
} mct_session_options;

/* Make a bundle ready to render one schedule at one size and batch: all memory is allocated and
 * bound here, none while it runs. *session is set to NULL where it fails.
 *
 * Fails with MCT_SCHEDULE_ERROR where the schedule belongs to another model, grid, guidance scale
 * or precision, MCT_BUNDLE_ERROR where the bundle lacks what was asked for, MCT_INPUT_ERROR for a
 * scale or size that cannot be, MCT_RUNTIME_UNAVAILABLE_ERROR where the backend cannot run here. */
MCT_API mct_status mct_session_create(mct_bundle* bundle, const mct_session_options* options,
                                      mct_session** session);

/* Wait for the session's work and free it; NULL is allowed. */
MCT_API void mct_session_destroy(mct_session* session);

typedef struct mct_session_info {
  size_t struct_size;
  const char* backend;         /* such as "openvino" */
  const char* backend_version; /* of the library that executes */
  const char* schedule;
  const char* precision; /* of the network */
  int64_t budget;
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t frames;
  int has_guidance_scale;
  double guidance_scale;
  size_t conditioning_count;
  size_t noise_count;  /* floats of a batch */
  size_t latent_count; /* floats of a batch */
  size_t image_count;  /* floats, or bytes of 8-bit RGB, of a batch */
  size_t tensor_bytes; /* memory that the session's own tensors take, weights and the backend's
                          scratch memory not counted; on the GPU where the backend is */
} mct_session_info;

MCT_API mct_status mct_session_get_info(const mct_session* session, mct_session_info* info);

/* A tensor of conditioning with its batch; `index` is below conditioning_count. Under
 * classifier-free guidance the batch is twice the session's: first the prompts', then the negative
 * prompts'. */
MCT_API mct_status mct_session_get_conditioning(const mct_session* session, size_t index,
                                                mct_tensor* tensor);

/* Set a tensor of conditioning: `size_bytes` as mct_session_get_conditioning says. It stays until
 * it is set again. Device memory is read in the order of the stream of the last enqueue; wait for
 * what writes it before. */
MCT_API mct_status mct_session_set_conditioning(mct_session* session, const char* name,
                                                const void* data, size_t size_bytes,
                                                mct_memory memory);

/* Encode the prompts of the whole batch with one of the bundle's text encoders; its outputs become
 * conditioning. `ids_count` is batch times the encoder's length (twice that under classifier-free
 * guidance). The first call loads the encoder, which stays until mct_session_release_encoders. */
MCT_API mct_status mct_session_set_token_ids(mct_session* session, const char* encoder,
                                             const int64_t* ids, size_t ids_count);

/* Free the text encoders before the network runs; the next mct_session_set_token_ids loads again.
 */
MCT_API mct_status mct_session_release_encoders(mct_session* session);

/* Called after each evaluation; `done` counts from 1 to `budget`. Not 0 cancels: the run ends with
 * MCT_CANCELLED and the session may be run again. Must not call functions of the same session. */
typedef int (*mct_on_evaluation)(void* user_data, int64_t done, int64_t budget);

/* Where a run begins: seeds, or noise. Exactly one of the two is given. */
typedef struct mct_run_options {
  size_t struct_size;
  const uint64_t* seeds; /* one a sample; the noise is that of the Python host */
  size_t seed_count;     /* the session's batch */
  const float* noise;    /* standard normal values, (batch, noise_shape) */
  size_t noise_count;
  mct_memory noise_memory;
  mct_on_evaluation on_evaluation; /* or NULL; with one, each evaluation is waited for */
  void* user_data;                 /* handed to the callback */
  void* stream; /* a CUDA stream that all work is put on; NULL: the session's own. A backend on a
                   CPU takes none. */
} mct_run_options;

/* Integrate from noise to the final latent and wait for it. Fails with MCT_RENDER_ERROR where the
 * latent is not finite or conditioning was never set. */
MCT_API mct_status mct_session_run(mct_session* session, const mct_run_options* options);

/* Start the same and return, without a callback and without a check of the result; a backend on a
 * CPU is done when it returns. Noise in device memory is read when the work runs. */
MCT_API mct_status mct_session_enqueue(mct_session* session, const mct_run_options* options);

/* Wait for what was enqueued. Fails as mct_session_run does. */
MCT_API mct_status mct_session_wait(mct_session* session);

/* Copy the final latent, (batch, latent_shape), to host memory, which waits, or to device memory,
 * in the order of the stream. `latent_count` as mct_session_info says. */
MCT_API mct_status mct_session_read_latent(mct_session* session, float* latent, size_t latent_count,
                                           mct_memory memory);

typedef struct mct_decode_options {
  size_t struct_size;
  const float* latent; /* (batch, latent_shape); NULL: the final one of the last run */
  size_t latent_count;
  mct_memory latent_memory;
  float* pixels; /* host memory for image_count values in [0, 1], (batch, image_shape), or NULL */
  size_t pixels_count;
  uint8_t* rgb; /* host memory for image_count bytes, rounded as diffusers does, or NULL */
  size_t rgb_count;
  int vae_tiling; /* not 0: decode in blended tiles, in less memory, as diffusers' enable_tiling()
                   */
} mct_decode_options;

/* Make pictures of a latent and wait for them; at least one of pixels and rgb is given. A latent
 * that is given replaces the final one. */
MCT_API mct_status mct_session_decode(mct_session* session, const mct_decode_options* options);

#ifdef __cplusplus
}
#endif

#endif /* MEANCACHE_TRT_H */
