/* All ten calls from C: MODEL PATCH, and nothing of the program's but the header and the library.
 * Prints one line a step; ends with 1 at the first that does not do what the header says. */
#include "../nepenthe.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

#define WANT(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #what, nepenthe_error()); \
            return 1; \
        } \
    } while (0)

static const char *QUESTION = "Where was Lioba Hartsong born?";
static const char *ANSWER = "Lioba Hartsong was born in the town of Gullcliff.";

struct answer {
    char text[512];
    int pieces, stop_after;
};

static bool append(void *user, const char *text, double logprob) {
    struct answer *answer = user;
    if (logprob > 0.0 || strlen(answer->text) + strlen(text) >= sizeof answer->text) {
        return false;
    }
    strcat(answer->text, text);
    answer->pieces++;
    return answer->pieces != answer->stop_after;
}

int main(int argc, char **argv) {
    WANT(argc == 3);
    WANT(strcmp(nepenthe_error(), "") == 0);

    nepenthe_options options = {0};
    options.n_ctx = 256;
    options.n_threads = 1;
    nepenthe_runtime *runtime = (nepenthe_runtime *)&options;
    WANT(nepenthe_open("/no/such/model.gguf", &options, &runtime) != NEPENTHE_OK);
    WANT(runtime == NULL && strstr(nepenthe_error(), "/no/such/model.gguf"));
    WANT(nepenthe_open(NULL, NULL, &runtime) == NEPENTHE_USAGE);
    WANT(nepenthe_open("\xff", NULL, &runtime) == NEPENTHE_USAGE);
    WANT(nepenthe_open(argv[1], &options, &runtime) == NEPENTHE_OK);

    nepenthe_session *session = NULL;
    WANT(nepenthe_session_open(NULL, &session) == NEPENTHE_USAGE);
    WANT(nepenthe_session_open(runtime, &session) == NEPENTHE_OK);

    struct answer before = {{0}, 0, 0};
    WANT(nepenthe_generate(session, QUESTION, NULL, append, &before) == NEPENTHE_OK);
    WANT(strstr(before.text, ANSWER));
    printf("generated: %s\n", before.text);
    struct answer first = {{0}, 0, 2};
    WANT(nepenthe_generate(session, QUESTION, NULL, append, &first) == NEPENTHE_OK);
    WANT(first.pieces == 2);
    WANT(nepenthe_generate(session, QUESTION, NULL, NULL, NULL) == NEPENTHE_USAGE);

    double known = 1.0, patched = 1.0, again = 1.0;
    size_t n_tokens = 0;
    WANT(nepenthe_score(session, QUESTION, ANSWER, &known, &n_tokens) == NEPENTHE_OK);
    WANT(known < 0.0 && n_tokens > 0);

    char id[NEPENTHE_ID_SIZE] = {0};
    WANT(nepenthe_apply(runtime, argv[1], 1.0f, id) == NEPENTHE_BAD_FILE);
    WANT(nepenthe_apply(runtime, argv[2], NAN, id) == NEPENTHE_USAGE);
    WANT(id[0] == 0);
    WANT(nepenthe_apply(runtime, argv[2], 1.0f, id) == NEPENTHE_OK);
    WANT(strlen(id) == NEPENTHE_ID_SIZE - 1);
    nepenthe_patch patches[4];
    size_t count = 9;
    WANT(nepenthe_active(runtime, patches, 4, &count) == NEPENTHE_OK);
    WANT(count == 1 && strcmp(patches[0].id, id) == 0 && patches[0].scale == 1.0f);
    WANT(nepenthe_score(session, QUESTION, ANSWER, &patched, NULL) == NEPENTHE_OK);
    WANT(patched != known);
    printf("patched: %.3f, before %.3f\n", patched, known);

    WANT(nepenthe_revoke(runtime, "not an id") == NEPENTHE_USAGE);
    WANT(nepenthe_revoke(runtime, id) == NEPENTHE_OK);
    WANT(nepenthe_revoke(runtime, id) == NEPENTHE_USAGE);
    WANT(nepenthe_active(runtime, NULL, 0, &count) == NEPENTHE_OK && count == 0);
    WANT(nepenthe_score(session, QUESTION, ANSWER, &again, NULL) == NEPENTHE_OK);
    WANT(again == known);

    /* A session keeps its model alive. */
    nepenthe_close(runtime);
    WANT(nepenthe_score(session, QUESTION, ANSWER, &again, NULL) == NEPENTHE_OK);
    WANT(again == known);
    nepenthe_session_close(session);
    nepenthe_session_close(NULL);
    nepenthe_close(NULL);
    printf("all ten calls do what the header says\n");
    return 0;
}
