//! What the scheduler asks a daemon for, answered for a member that is none.

use stepmesh_proto::control::{Failed, MemberStats, SequenceEvent, failed, from_member, sequence_event, to_member};

/// The answer to a message of the scheduler's that wants one and that an embedding program knows nothing of: prompts
/// are refused, figures are empty.
pub fn answer(body: &to_member::Body) -> Option<from_member::Body> {
    match body {
        to_member::Body::StartSequence(start) => {
            let message = "this attention instance is driven by another program and takes no prompts".to_owned();
            let failed = Failed { kind: failed::Kind::Invalid.into(), message };
            let body = Some(sequence_event::Body::Failed(failed));
            Some(from_member::Body::SequenceEvent(SequenceEvent { sequence: start.sequence, body }))
        }
        to_member::Body::ReportStats(report) => {
            Some(from_member::Body::Stats(MemberStats { request: report.request, ..MemberStats::default() }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stepmesh_proto::control::StartSequence;

    #[test]
    fn a_prompt_is_refused_and_says_why() {
        let start = StartSequence { sequence: 7, ..StartSequence::default() };
        let Some(from_member::Body::SequenceEvent(event)) = answer(&to_member::Body::StartSequence(start)) else {
            panic!("no answer");
        };
        assert_eq!(event.sequence, 7);
        assert!(format!("{event:?}").contains("takes no prompts"));
    }
}
