//! Decodes any number of sequences at once and gathers what comes back.

use crate::client::{Client, Piece};
use crate::error::CliError;
use stepmesh_proto::control::Sampling;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// One sequence to decode.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_new_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) logits: bool,
    /// Greedy where absent.
    pub(crate) sampling: Option<Sampling>,
}

/// What one sequence became.
#[derive(Clone, Debug, Default)]
pub(crate) struct Decoded {
    /// Without the prompt.
    pub(crate) tokens: Vec<u32>,
    /// Of each token, since the one before it or since the sequence's admission.
    pub(crate) elapsed_ns: Vec<u64>,
    /// `[tokens, vocab]` of f32, little endian, when asked for.
    pub(crate) logits: Vec<u8>,
}

/// Decodes all `requests` concurrently. `observe` sees each sequence grow: its index and all it has so far.
pub(crate) async fn decode(
    client: &Client,
    requests: &[Request],
    mut observe: impl FnMut(usize, &[u32]),
) -> Result<Vec<Decoded>, CliError> {
    let mut sequences = vec![Decoded::default(); requests.len()];
    let (sender, mut pieces) = mpsc::unbounded_channel();
    let mut streams = JoinSet::new();
    for (index, request) in requests.iter().cloned().enumerate() {
        let (client, sender) = (client.clone(), sender.clone());
        streams.spawn(async move {
            let pass_on = |piece| drop(sender.send((index, piece)));
            client.generate(request, pass_on).await.map_err(|error| error.of_sequence(index))
        });
    }
    drop(sender);
    loop {
        tokio::select! {
            biased;
            Some((index, piece)) = pieces.recv() => {
                take(&mut sequences[index], piece);
                observe(index, &sequences[index].tokens);
            }
            Some(ended) = streams.join_next() => {
                ended.map_err(|error| CliError::failed(format!("a request's task ended: {error}")))??;
            }
            else => return Ok(sequences),
        }
    }
}

fn take(sequence: &mut Decoded, piece: Piece) {
    sequence.tokens.push(piece.token);
    sequence.elapsed_ns.push(piece.elapsed_ns);
    sequence.logits.extend_from_slice(&piece.logits);
}
