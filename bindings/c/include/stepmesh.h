// The C API of stepmesh. Generated from bindings/c/src: change it there, then
// STEPMESH_BLESS=1 cargo test -p stepmesh-c --test header
//
// A call returns a StepmeshStatus. What went wrong is said in words by stepmesh_last_error_message.
//
// Threads: handles may be used from any thread, one call at a time for each handle. A second call that overlaps
// returns STEPMESH_STATUS_BUSY and does nothing; stepmesh_wake alone may be called at any time. Handles do not
// disturb each other.
//
// Progress is made by the calls. A member whose owner does not call cannot answer its peers: call stepmesh_poll, or
// anything else, at least every few seconds.
//
// Pointers given in must be null or point to what the parameter says; null is refused where it makes no sense.
// Pointers given out lead into registered memory. How long they hold is said at each call; stepmesh_close ends all.

#ifndef STEPMESH_H
#define STEPMESH_H

#include <stddef.h>
#include <stdint.h>

// Bytes of an event's message, its end included.
#define STEPMESH_MESSAGE_BYTES 256

// How a call ended.
typedef enum {
  // As asked.
  STEPMESH_STATUS_OK = 0,
  // An argument is null, out of its range, or does not fit the layout. Nothing was changed.
  STEPMESH_STATUS_INVALID = 1,
  // No such handle, ticket, batch, segment, part or reply (any more), or a handle of the other side.
  STEPMESH_STATUS_UNKNOWN = 2,
  // Another call on the handle is under way. Nothing was changed.
  STEPMESH_STATUS_BUSY = 3,
  // The microbatch is in use: by a buffer, a ticket, or a reply that is under way.
  STEPMESH_STATUS_WOULD_BLOCK = 4,
  // The deadline passed. What was waited for is still outstanding.
  STEPMESH_STATUS_TIMEOUT = 5,
  // Not every FFN instance is linked (yet, or any more). Poll and try again.
  STEPMESH_STATUS_NOT_LINKED = 6,
  // The ticket failed: the link to a peer ended before its reply. The ticket is consumed.
  STEPMESH_STATUS_PEER_LOST = 7,
  // The ticket failed: a peer could not process the request. The ticket is consumed.
  STEPMESH_STATUS_PEER_FAILED = 8,
  // The ticket was cancelled and is consumed.
  STEPMESH_STATUS_CANCELLED = 9,
  // The scheduler refused this member, or its token.
  STEPMESH_STATUS_REFUSED = 10,
  // The scheduler cannot be reached, or is lost.
  STEPMESH_STATUS_SCHEDULER_LOST = 11,
  // The provider or the system refused or failed.
  STEPMESH_STATUS_TRANSPORT = 12,
  // A bug in stepmesh was caught. Close the handle.
  STEPMESH_STATUS_PANIC = 13,
} StepmeshStatus;

// Element types. The mesh moves bytes; the type is carried along.
typedef enum {
  // Bytes without a type.
  STEPMESH_DTYPE_BYTES = 0,
  // IEEE single.
  STEPMESH_DTYPE_F32 = 1,
  // bfloat16.
  STEPMESH_DTYPE_BF16 = 2,
  // IEEE half.
  STEPMESH_DTYPE_F16 = 3,
  // FP8, e4m3fn.
  STEPMESH_DTYPE_FP8_E4M3 = 4,
  // FP8, e5m2.
  STEPMESH_DTYPE_FP8_E5M2 = 5,
  // Unsigned, 8 bits.
  STEPMESH_DTYPE_U8 = 6,
  // Unsigned, 16 bits.
  STEPMESH_DTYPE_U16 = 7,
  // Signed, 32 bits.
  STEPMESH_DTYPE_I32 = 8,
  // Signed, 64 bits.
  STEPMESH_DTYPE_I64 = 9,
  // Unsigned, 32 bits.
  STEPMESH_DTYPE_U32 = 10,
  // IEEE double.
  STEPMESH_DTYPE_F64 = 11,
  // Signed, 8 bits.
  STEPMESH_DTYPE_I8 = 12,
  // Signed, 16 bits.
  STEPMESH_DTYPE_I16 = 13,
  // Boolean, one byte.
  STEPMESH_DTYPE_BOOL = 14,
} StepmeshDtype;

// How tensors travel.
typedef enum {
  // Processes of one host.
  STEPMESH_TRANSPORT_SHM = 0,
  // Any two hosts.
  STEPMESH_TRANSPORT_TCP = 1,
  // Hosts with RDMA; libibverbs is loaded when it is asked for.
  STEPMESH_TRANSPORT_VERBS = 2,
} StepmeshTransport;

// When a batch is released.
typedef enum {
  // With every attention instance that can still reach the group.
  STEPMESH_POLICY_ALL = 0,
  // At once, with whoever is there.
  STEPMESH_POLICY_ANY = 1,
  // When `value` attention instances are there, or nobody else can still reach the group.
  STEPMESH_POLICY_AT_LEAST = 2,
  // As ALL, but no later than `value` milliseconds after the group's first arrival.
  STEPMESH_POLICY_DEADLINE = 3,
} StepmeshPolicy;

// What an event is about.
typedef enum {
  // There is no event.
  STEPMESH_EVENT_KIND_NONE = 0,
  // This member was admitted: rank, epoch.
  STEPMESH_EVENT_KIND_JOINED = 1,
  // The link to a peer is up: role, rank.
  STEPMESH_EVENT_KIND_LINK_UP = 2,
  // The link to a peer is down; a new one follows if the peer is still a member: role, rank, message.
  STEPMESH_EVENT_KIND_LINK_DOWN = 3,
  // A member is lost; its rank may be taken by another one: role, rank, message.
  STEPMESH_EVENT_KIND_PEER_LOST = 4,
  // A new membership: epoch, complete.
  STEPMESH_EVENT_KIND_EPOCH = 5,
  // The scheduler is lost. Links live on until they break: message.
  STEPMESH_EVENT_KIND_SCHEDULER_LOST = 6,
  // The scheduler shuts down: finish what is in flight, then close.
  STEPMESH_EVENT_KIND_DRAINING = 7,
} StepmeshEventKind;

// A part that is to be sent, `[rows, row_bytes]`. It lies where the layout has the part of the same index.
typedef struct {
  // The caller's name for it.
  uint64_t key;
  // A StepmeshDtype.
  uint32_t dtype;
  // Rows in use; zero is legal.
  uint32_t rows;
  // Bytes of one row.
  uint32_t row_bytes;
} StepmeshPart;

// What a request says besides its tensors.
typedef struct {
  // Requests of equal microbatch and group may share a batch on the FFN side: the layer. Groups of a microbatch
  // should grow from request to request within a step.
  uint32_t group;
  // Not zero: the FFN side need not wait for this instance on this microbatch after this request.
  uint32_t leave;
  // For the FFN side's program.
  uint8_t app[16];
  // The parts in use, in the layout's order, at most 8.
  const StepmeshPart *parts;
  // How many.
  size_t part_count;
} StepmeshRequest;

// A part that arrived, `[rows, row_bytes]`, in the slot where it landed.
typedef struct {
  // The sender's name for it.
  uint64_t key;
  // A StepmeshDtype.
  uint32_t dtype;
  // Rows in use.
  uint32_t rows;
  // Bytes of one row.
  uint32_t row_bytes;
  // rows * row_bytes bytes: on the GPU if the slots are.
  const void *data;
} StepmeshTensor;

// The requests of one (microbatch, group), by ascending rank of the attention instances.
typedef struct {
  // Stands for it until stepmesh_respond.
  uint64_t id;
  // The microbatch.
  uint32_t microbatch;
  // The group: the layer.
  uint32_t group;
  // How many requests.
  size_t segments;
} StepmeshBatch;

// One attention instance's request in a batch.
typedef struct {
  // The attention instance.
  uint32_t rank;
  // Parts that were sent.
  uint32_t parts;
  // The attention side's bytes.
  uint8_t app[16];
} StepmeshSegment;

// Room for one part of a transfer: at most max_rows * row_bytes bytes.
typedef struct {
  // Bytes of the widest row.
  uint32_t row_bytes;
  // Most rows.
  uint32_t max_rows;
} StepmeshPartSpec;

// How a member joins. Set it to zero, then what differs: zero and null are the defaults, but for the scheduler and
// the layout. All members of a deployment must agree on transport, lanes, layout and workload.
typedef struct {
  // The scheduler's address, http://host:port.
  const char *scheduler;
  // The cluster's token; null if the scheduler asks for none.
  const char *token;
  // For people: what the others call this member in their messages.
  const char *name;
  // What is computed, for comparison between members.
  const char *workload;
  // A StepmeshTransport.
  uint32_t transport;
  // Lanes of each link, 1 to 8; zero means 1.
  uint32_t lanes;
  // tcp: the IP address that peers dial; null means 127.0.0.1.
  const char *address;
  // One more than the rank to ask for; zero means the lowest free one.
  uint32_t rank_plus_one;
  // Microbatches, each with one slot per peer and direction.
  uint32_t microbatches;
  // The parts of a request, at most 8.
  const StepmeshPartSpec *request;
  // How many.
  size_t request_parts;
  // The parts of a reply, at most 8.
  const StepmeshPartSpec *reply;
  // How many.
  size_t reply_parts;
  // Most bytes of registered memory; zero means 4 GiB.
  uint64_t memory_limit_bytes;
  // How long to look for the scheduler, and then to wait to be admitted; zero means 30 s.
  uint32_t join_timeout_ms;
  // One more than the GPU that the slots are to be on, as CUDA counts those that are visible; zero means host memory.
  // Over tcp they are then page-locked host memory, which streams copy to and from.
  uint32_t gpu_plus_one;
} StepmeshOptions;

// What a member is.
typedef struct {
  // Its rank on its side.
  uint32_t rank;
  // Instances of the other side.
  uint32_t peers;
  // Not zero: every rank is held and every link is up.
  uint32_t complete;
} StepmeshMember;

// An event. Fields that its kind does not name are zero.
typedef struct {
  // A StepmeshEventKind.
  uint32_t kind;
  // The peer's side: 1 attention, 2 FFN.
  uint32_t role;
  // The peer's rank; this member's own if it has joined.
  uint32_t rank;
  // Not zero: every rank is held and every link is up.
  uint32_t complete;
  // The membership's number.
  uint64_t epoch;
  // Words for people, terminated, cut off if too long.
  char message[STEPMESH_MESSAGE_BYTES];
} StepmeshEvent;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Takes a microbatch's send slot, to be filled through stepmesh_send_part. WOULD_BLOCK while an earlier request on
// it is under way or not waited for; NOT_LINKED while an FFN instance is missing. Makes no progress: poll between
// attempts.
StepmeshStatus stepmesh_acquire(uint64_t handle,
                                uint32_t microbatch);

// Where a part of an acquired send slot lies: *bytes bytes at *data, to be filled before stepmesh_push_pull. The
// address of a part never changes while the handle lives, but may be written only between acquire and push_pull. It is the
// GPU's where the slots are on one.
StepmeshStatus stepmesh_send_part(uint64_t handle,
                                  uint32_t microbatch,
                                  uint32_t part,
                                  void **data,
                                  size_t *bytes);

// Sends an acquired slot to every FFN instance. *ticket stands for all their replies. A request that is refused
// gives the slot back: acquire it anew.
StepmeshStatus stepmesh_push_pull(uint64_t handle,
                                  uint32_t microbatch,
                                  const StepmeshRequest *request,
                                  uint64_t *ticket);

// Waits for all replies to a request, then consumes the ticket. TIMEOUT leaves it outstanding: wait again, or cancel.
StepmeshStatus stepmesh_wait(uint64_t handle,
                             uint64_t ticket,
                             uint32_t timeout_ms);

// Gives a ticket up and consumes it. The FFN instances that have not replied are fenced off; the microbatch can be
// acquired again when their links are back.
StepmeshStatus stepmesh_cancel(uint64_t handle,
                               uint64_t ticket);

// A part of one FFN instance's reply to a request that was waited for, in the slot where it landed. The bytes hold
// until the next stepmesh_push_pull or stepmesh_leave on the microbatch.
StepmeshStatus stepmesh_reply(uint64_t handle,
                              uint32_t microbatch,
                              uint32_t rank,
                              uint32_t part,
                              StepmeshTensor *tensor);

// Gives an acquired send slot back without sending it.
StepmeshStatus stepmesh_release(uint64_t handle, uint32_t microbatch);

// Tells the FFN instances not to wait for this instance on a microbatch until its next request. Takes the slot for
// one round trip; WOULD_BLOCK while it is in use.
StepmeshStatus stepmesh_leave(uint64_t handle,
                              uint32_t microbatch);

// Waits for the next batch that the policy (a StepmeshPolicy, with its value) allows. TIMEOUT when there is none
// yet, and earlier when an event has come. Every batch must be answered with stepmesh_respond: one that is kept
// holds up its attention instances, and after a minute the members of a link that has ended meanwhile.
StepmeshStatus stepmesh_next_batch(uint64_t handle,
                                   uint32_t policy,
                                   uint32_t value,
                                   uint32_t timeout_ms,
                                   StepmeshBatch *batch);

// Who sent a segment of a batch.
StepmeshStatus stepmesh_segment(uint64_t handle, uint64_t batch, size_t segment, StepmeshSegment *out);

// A part that a segment's attention instance sent. The bytes hold until stepmesh_respond.
StepmeshStatus stepmesh_segment_part(uint64_t handle,
                                     uint64_t batch,
                                     size_t segment,
                                     uint32_t part,
                                     StepmeshTensor *tensor);

// Where a part of the reply to a segment is to be put: *bytes bytes at *data, until stepmesh_respond.
StepmeshStatus stepmesh_segment_reply(uint64_t handle,
                                      uint64_t batch,
                                      size_t segment,
                                      uint32_t part,
                                      void **data,
                                      size_t *bytes);

// Says which parts of the reply to a segment are in use. Without it the reply is empty.
StepmeshStatus stepmesh_segment_set_reply(uint64_t handle,
                                          uint64_t batch,
                                          size_t segment,
                                          const StepmeshPart *parts,
                                          size_t part_count);

// Answers that a segment could not be processed. At most 16 bytes of the reason travel; null says nothing.
StepmeshStatus stepmesh_segment_fail(uint64_t handle, uint64_t batch, size_t segment, const char *reason);

// Sends every segment's reply; the batch is no longer in hand, whatever the status. Segments whose attention instance
// is gone are dropped: its loss is an event.
StepmeshStatus stepmesh_respond(uint64_t handle,
                                uint64_t batch);

// Joins as an attention instance and returns when the scheduler has admitted this member. The links come up while
// calls are made: see stepmesh_wait_complete.
StepmeshStatus stepmesh_join_attention(const StepmeshOptions *options,
                                       uint64_t *handle);

// Joins as an FFN instance; otherwise as stepmesh_join_attention.
StepmeshStatus stepmesh_join_ffn(const StepmeshOptions *options, uint64_t *handle);

// Says what a member is. Makes no progress.
StepmeshStatus stepmesh_describe(uint64_t handle, StepmeshMember *member);

// Waits until every rank is held and every link is up.
StepmeshStatus stepmesh_wait_complete(uint64_t handle, uint32_t timeout_ms);

// Makes progress without blocking. `events`, if not null, gets the number of events that wait for
// stepmesh_next_event.
StepmeshStatus stepmesh_poll(uint64_t handle, size_t *events);

// Takes the oldest event. Its kind is STEPMESH_EVENT_KIND_NONE if there is none. Makes no progress. At most 1024
// events are kept; beyond that the oldest are dropped.
StepmeshStatus stepmesh_next_event(uint64_t handle,
                                   StepmeshEvent *event);

// Wakes the call that sleeps on this handle in another thread, or the next one that would: it looks again whether
// what it waits for is there, and at its deadline. May be called at any time.
StepmeshStatus stepmesh_wake(uint64_t handle);

// Leaves the mesh and frees the member with all its memory. The handle is unknown from then on. Takes at most about
// a second to say good-bye.
StepmeshStatus stepmesh_close(uint64_t handle);

// What the last call of this thread that failed has to say. Never null. Holds until the next call of this thread
// that fails.
const char *stepmesh_last_error_message(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* STEPMESH_H */
