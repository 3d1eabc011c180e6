//! The control queue pair of a link: messages of 32 bits, a kind and a tag that only the two ends know, sent as
//! immediates without payload. It gives no right to memory, so it may live on when the lanes are gone.

use super::endpoint::Rail;
use super::queue_pair::{Half, PeerPort, QueuePair, Shape};
use super::sys::*;
use crate::TransportError;

const SENDS: usize = 8;
const RECEIVES: usize = 16;
/// Completions that it may have in the queue; twice over, as it may be made anew once in between.
pub(super) const COMPLETIONS: usize = 2 * (SENDS + RECEIVES);

/// What one end tells the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The active end can receive.
    Hello = 1,
    /// The passive end can, too.
    Welcome = 2,
    /// Are you there? The acknowledgement is the answer.
    Ping = 3,
    /// The link is closed in good order.
    Bye = 4,
    /// This end's work was refused.
    Refused = 5,
    /// This end has lost the link.
    Lost = 6,
}

impl Message {
    /// As on the wire: a kind of 4 bits, the tag.
    pub(super) fn bits(self, tag: u32) -> u32 {
        (self as u32) << 28 | tag
    }

    /// What `immediate` says, if it carries the tag.
    pub(super) fn read(immediate: u32, tag: u32) -> Option<Self> {
        if immediate & 0x0FFF_FFFF != tag {
            return None;
        }
        [Self::Hello, Self::Welcome, Self::Ping, Self::Bye, Self::Refused, Self::Lost]
            .into_iter()
            .find(|&message| message as u32 == immediate >> 28)
    }
}

/// See the module.
pub(super) struct Control {
    pair: QueuePair,
    id: u64,
    tag: u32,
    /// Messages that are not acknowledged.
    pub(super) unsent: usize,
    /// It has failed: nothing can be said any more.
    pub(super) failed: bool,
}

impl Control {
    /// A queue pair that can receive once it is connected. `id` is what its completions are known by.
    pub(super) fn new(rail: &mut Rail, id: u64, tag: u32) -> Result<Self, TransportError> {
        let Rail { context, queue, .. } = rail;
        let shape = Shape { sends: SENDS, receives: RECEIVES, inline: 0, access: 0 };
        let mut pair = QueuePair::new(context, queue, shape)?;
        pair.post_receives(id, RECEIVES)?;
        queue.reserve(COMPLETIONS)?;
        Ok(Self { pair, id, tag, unsent: 0, failed: false })
    }

    pub(super) fn pair(&self) -> &QueuePair {
        &self.pair
    }

    /// Begins anew after a failure.
    pub(super) fn reconnect(&mut self, peer: &PeerPort, half: Half) -> Result<(), TransportError> {
        self.pair.reset()?;
        self.pair.post_receives(self.id, RECEIVES)?;
        self.pair.connect(peer, half)?;
        (self.unsent, self.failed) = (0, false);
        Ok(())
    }

    /// Sends a message; it is lost if the queue pair has failed or the peer has left all earlier ones unanswered.
    pub(super) fn send(&mut self, message: Message) {
        if self.failed || self.unsent == SENDS {
            return;
        }
        let mut request = ibv_send_wr {
            wr_id: self.id | super::lane::SEND,
            opcode: IBV_WR_SEND_WITH_IMM,
            send_flags: IBV_SEND_SIGNALED,
            __bindgen_anon_1: ibv_send_wr__bindgen_ty_1 { imm_data: message.bits(self.tag).to_be() },
            ..Default::default()
        };
        // SAFETY: a list of one request, which names no memory.
        match unsafe { self.pair.post_send(&mut request) } {
            Ok(()) => self.unsent += 1,
            Err(_) => self.failed = true,
        }
    }

    /// The message that an immediate carries; none if it is not of this link.
    pub(super) fn read(&self, immediate: u32) -> Option<Message> {
        Message::read(immediate, self.tag)
    }

    /// Posts again a receive that was used.
    pub(super) fn replenish(&mut self) {
        self.failed |= self.pair.post_receives(self.id, 1).is_err();
    }
}
