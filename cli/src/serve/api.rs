//! OpenAI's shapes: what is asked, what is answered, what is refused.

pub(super) mod answer;
pub(super) mod error;
pub(super) mod fields;
pub(super) mod request;
