/* nepenthe's embedded runtime. Written by cbindgen from src/capi/lib.rs; do not edit.
 * Link with libnepenthe_c.so, or with libnepenthe_c.a -lstdc++ -lz -lm -lpthread -ldl. */

#ifndef NEPENTHE_H
#define NEPENTHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// No error.
#define NEPENTHE_OK 0

// An argument that cannot be used: a null pointer, text that is no UTF-8, a bad number.
#define NEPENTHE_USAGE 2

// A file that is malformed.
#define NEPENTHE_BAD_FILE 3

// A patch that is not for this model, or not signed by the key that is required.
#define NEPENTHE_MISMATCH 4

// Not enough memory or disk, or a limit of the options.
#define NEPENTHE_RESOURCES 6

// The engine failed.
#define NEPENTHE_ENGINE 8

// Characters of a patch's id, with the NUL.
#define NEPENTHE_ID_SIZE 65

// A model and its active patches. Any thread may use it at any time.
typedef struct nepenthe_runtime nepenthe_runtime;

// One context. One thread at a time may use it; it keeps its model alive.
typedef struct nepenthe_session nepenthe_session;

// How a runtime is set up. Zeros and nulls mean the defaults.
typedef struct {
  // Tokens a session's context holds; 0: 2048.
  uint32_t n_ctx;
  // Threads of each session; 0: all cores.
  uint32_t n_threads;
  // Layers on the GPU; negative: all.
  int32_t n_gpu_layers;
  // Take only patches signed by this key, a minisign public key or its file; null: any.
  const char *require_signature;
} nepenthe_options;

// A patch that applies.
typedef struct {
  // SHA-256 of its file, NUL-terminated.
  char id[NEPENTHE_ID_SIZE];
  // The scale it applies at.
  float scale;
} nepenthe_patch;

// How to generate. Zeros mean the defaults.
typedef struct {
  // Most tokens; 0: 256.
  size_t max_tokens;
  // Temperature; 0: the likeliest token every time.
  float temp;
  // Seed.
  uint32_t seed;
} nepenthe_sampling;

// Receives text as it is made: NUL-terminated, valid during the call, empty while a character is
// unfinished. Returns false to stop. It must return, not jump or throw.
typedef bool (*nepenthe_piece)(void *user, const char *text, double logprob);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Open the model file `model`; `options` may be null. On success `*runtime` is to be closed with
// nepenthe_close.
int32_t nepenthe_open(const char *model,
                      const nepenthe_options *options,
                      nepenthe_runtime **runtime);

// Close a runtime; null is ignored. Its sessions may live on.
void nepenthe_close(nepenthe_runtime *runtime);

// Apply the patch file `path`, `scale` times. If `id` is not null it receives the patch's id,
// NEPENTHE_ID_SIZE characters. On failure nothing has changed.
int32_t nepenthe_apply(const nepenthe_runtime *runtime, const char *path, float scale, char *id);

// Take back the patch with this id.
int32_t nepenthe_revoke(const nepenthe_runtime *runtime, const char *id);

// The active patches: `*count` receives how many they are, and `patches` (null, or room for
// `capacity` of them) as many as there is room for, in the order of their ids.
int32_t nepenthe_active(const nepenthe_runtime *runtime,
                        nepenthe_patch *patches,
                        size_t capacity,
                        size_t *count);

// Open a session. On success `*session` is to be closed with nepenthe_session_close.
int32_t nepenthe_session_open(const nepenthe_runtime *runtime, nepenthe_session **session);

// Close a session; null is ignored.
void nepenthe_session_close(nepenthe_session *session);

// Generate an answer to the user's message `prompt`, each piece of it given to `piece` (with
// `user`) as it is made. `sampling` may be null. The answer is generated, first token to last,
// under the patches that are active when the call begins.
int32_t nepenthe_generate(nepenthe_session *session,
                          const char *prompt,
                          const nepenthe_sampling *sampling,
                          nepenthe_piece piece,
                          void *user);

// Log-probability of `answer` (its end included) after the user's message `prompt`, under the
// patches that are active when the call begins; `n_tokens` may be null.
int32_t nepenthe_score(nepenthe_session *session,
                       const char *prompt,
                       const char *answer,
                       double *logprob,
                       size_t *n_tokens);

// What the last call of this thread that failed failed with: one sentence, valid until the next
// failure on this thread; empty before the first.
const char *nepenthe_error(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NEPENTHE_H */
