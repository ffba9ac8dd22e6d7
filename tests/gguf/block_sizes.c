/* Prints the golden table of types.rs: name, elements and bytes per block, as the C compiler sees
 * ggml 0.26's structs. Build with
 *   cc -I LLAMA_CPP/ggml/src block_sizes.c -o /tmp/block_sizes && /tmp/block_sizes
 */
#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include <stdio.h>

#define ROW(name, len) printf("(\"%s\", %d, %zu),\n", #name, (int) (len), sizeof(block_##name))

int main(void) {
    ROW(q4_0, QK4_0); ROW(q4_1, QK4_1); ROW(q5_0, QK5_0); ROW(q5_1, QK5_1);
    ROW(q8_0, QK8_0); ROW(q8_1, QK8_1);
    ROW(q2_K, QK_K); ROW(q3_K, QK_K); ROW(q4_K, QK_K); ROW(q5_K, QK_K); ROW(q6_K, QK_K);
    ROW(q8_K, QK_K);
    ROW(iq2_xxs, QK_K); ROW(iq2_xs, QK_K); ROW(iq3_xxs, QK_K); ROW(iq1_s, QK_K);
    ROW(iq4_nl, QK4_NL); ROW(iq3_s, QK_K); ROW(iq2_s, QK_K); ROW(iq4_xs, QK_K);
    ROW(iq1_m, QK_K); ROW(tq1_0, QK_K); ROW(tq2_0, QK_K);
    ROW(mxfp4, QK_MXFP4); ROW(nvfp4, QK_NVFP4); ROW(q1_0, QK1_0); ROW(q2_0, QK2_0);
    return 0;
}
