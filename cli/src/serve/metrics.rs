//! What the server counts, for Prometheus.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A route, and how a request of it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Ending {
    pub(super) route: &'static str,
    pub(super) status: u16,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    pub(super) requests: Family<Ending, Counter>,
    pub(super) prompt_tokens: Counter,
    pub(super) generated_tokens: Counter,
    pub(super) cancelled: Counter,
    pub(super) running: Gauge,
    pub(super) first_token: Histogram,
    pub(super) token: Histogram,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("stepmesh");
        let requests = Family::default();
        let [prompt_tokens, generated_tokens, cancelled] = [(); 3].map(|()| Counter::default());
        let running = Gauge::default();
        let [first_token, token] = [(); 2].map(|()| Histogram::new(exponential_buckets(1e-4, 2.0, 18)));
        registry.register("http_requests", "Requests that were answered", requests.clone());
        registry.register("prompt_tokens", "Tokens of prompts", prompt_tokens.clone());
        registry.register("generated_tokens", "Tokens generated", generated_tokens.clone());
        registry.register("cancelled_choices", "Choices whose client went away", cancelled.clone());
        registry.register("running_choices", "Choices being generated", running.clone());
        let mut seconds = |name: &str, help: &str, histogram: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        seconds("time_to_first_token", "From a choice's start to its first token", &first_token);
        seconds("time_per_output_token", "From a token to the next", &token);
        Self { registry, requests, prompt_tokens, generated_tokens, cancelled, running, first_token, token }
    }

    /// In Prometheus' text format.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
