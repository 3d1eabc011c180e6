// One layer's round trip and back: `echo ffn URL ROUNDS` answers, `echo attention URL ROUNDS` asks.
//
// The attention side sends rows of numbers; the FFN side sends them back doubled. A scheduler for 1 attention and
// 1 FFN instance must run at URL.
#include "stepmesh.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 4, COLUMNS = 64, ROW_BYTES = COLUMNS * sizeof(float), TIMEOUT_MS = 10000 };

static void check(StepmeshStatus status, const char *what) {
  if (status != STEPMESH_STATUS_OK) {
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, stepmesh_last_error_message());
    exit(1);
  }
}

static StepmeshOptions options(const char *url, const char *name) {
  static const StepmeshPartSpec rows = {.row_bytes = ROW_BYTES, .max_rows = ROWS};
  StepmeshOptions options = {0};
  options.scheduler = url;
  options.name = name;
  options.workload = "echo";
  options.transport = STEPMESH_TRANSPORT_SHM;
  options.microbatches = 1;
  options.request = options.reply = &rows;
  options.request_parts = options.reply_parts = 1;
  return options;
}

static void attention(const char *url, unsigned rounds) {
  StepmeshOptions how = options(url, "echo attention");
  uint64_t mesh = 0;
  check(stepmesh_join_attention(&how, &mesh), "join");
  check(stepmesh_wait_complete(mesh, TIMEOUT_MS), "wait for the FFN side");

  for (unsigned round = 1; round <= rounds; round++) {
    void *data = NULL;
    size_t bytes = 0;
    check(stepmesh_acquire(mesh, 0), "acquire");
    check(stepmesh_send_part(mesh, 0, 0, &data, &bytes), "send part");
    float *sent = data;
    for (unsigned i = 0; i < bytes / sizeof(float); i++) sent[i] = (float)(round + i);

    StepmeshPart part = {.key = 7, .dtype = STEPMESH_DTYPE_F32, .rows = ROWS, .row_bytes = ROW_BYTES};
    StepmeshRequest request = {.group = round, .parts = &part, .part_count = 1};
    uint64_t ticket = 0;
    check(stepmesh_push_pull(mesh, 0, &request, &ticket), "push_pull");
    check(stepmesh_wait(mesh, ticket, TIMEOUT_MS), "wait");

    StepmeshTensor reply = {0};
    check(stepmesh_reply(mesh, 0, 0, 0, &reply), "reply");
    const float *got = reply.data;
    for (unsigned i = 0; i < reply.rows * COLUMNS; i++) {
      if (got[i] != 2 * (float)(round + i)) {
        fprintf(stderr, "round %u: %f at %u\n", round, got[i], i);
        exit(1);
      }
    }
  }
  check(stepmesh_close(mesh), "close");
  printf("%u round trips, all right\n", rounds);
}

static void ffn(const char *url, unsigned rounds) {
  StepmeshOptions how = options(url, "echo ffn");
  uint64_t mesh = 0;
  check(stepmesh_join_ffn(&how, &mesh), "join");
  check(stepmesh_wait_complete(mesh, TIMEOUT_MS), "wait for the attention side");

  unsigned answered = 0;
  for (int left = 0; !left;) {
    StepmeshBatch batch;
    StepmeshStatus status = stepmesh_next_batch(mesh, STEPMESH_POLICY_ALL, 0, TIMEOUT_MS, &batch);
    StepmeshEvent event;
    do {
      check(stepmesh_next_event(mesh, &event), "next event");
      left |= event.kind == STEPMESH_EVENT_KIND_PEER_LOST;
    } while (event.kind != STEPMESH_EVENT_KIND_NONE);
    if (status == STEPMESH_STATUS_TIMEOUT) continue;
    check(status, "next batch");

    for (size_t i = 0; i < batch.segments; i++) {
      StepmeshTensor in;
      void *out = NULL;
      size_t bytes = 0;
      check(stepmesh_segment_part(mesh, batch.id, i, 0, &in), "segment part");
      check(stepmesh_segment_reply(mesh, batch.id, i, 0, &out, &bytes), "segment reply");
      const float *from = in.data;
      float *to = out;
      for (unsigned j = 0; j < in.rows * COLUMNS; j++) to[j] = 2 * from[j];
      StepmeshPart part = {.key = in.key, .dtype = in.dtype, .rows = in.rows, .row_bytes = in.row_bytes};
      check(stepmesh_segment_set_reply(mesh, batch.id, i, &part, 1), "set reply");
    }
    check(stepmesh_respond(mesh, batch.id), "respond");
    answered++;
  }
  check(stepmesh_close(mesh), "close");
  printf("%u of %u batches answered\n", answered, rounds);
}

int main(int argc, char **argv) {
  if (argc == 4 && strcmp(argv[1], "attention") == 0) {
    attention(argv[2], (unsigned)atoi(argv[3]));
  } else if (argc == 4 && strcmp(argv[1], "ffn") == 0) {
    ffn(argv[2], (unsigned)atoi(argv[3]));
  } else {
    fprintf(stderr, "usage: %s attention|ffn SCHEDULER_URL ROUNDS\n", argv[0]);
    return 2;
  }
  return 0;
}
