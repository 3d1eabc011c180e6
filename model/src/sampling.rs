//! How the next token is chosen from its logits: greedily, or drawn after temperature, top-k and top-p.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::ModelError;

/// Which tokens may be drawn, and how far their probabilities are levelled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by it: above 1 levels, below 1 sharpens; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only so many of the likeliest tokens; 0 takes all.
    pub top_k: u32,
    /// Only the likeliest tokens that together have at least this probability, above 0; 1 takes all.
    pub top_p: f32,
    /// Alike seeds give alike tokens.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Chooses the tokens of one sequence. What it chooses depends on the options, the logits and the tokens before only.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    random: ChaCha8Rng,
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler at the start of a sequence.
    ///
    /// # Errors
    /// [`ModelError::Sampling`] names the option that makes no sense.
    pub fn new(options: SamplingOptions) -> Result<Self, ModelError> {
        let wrong = |option, value: f32, expected| Err(ModelError::Sampling { option, value, expected });
        if !(0.0..=100.0).contains(&options.temperature) {
            return wrong("temperature", options.temperature, "from 0 to 100");
        }
        if !(options.top_p > 0.0 && options.top_p <= 1.0) {
            return wrong("top_p", options.top_p, "above 0 and at most 1");
        }
        Ok(Self { options, random: ChaCha8Rng::seed_from_u64(options.seed), candidates: Vec::new() })
    }

    /// The next token, given one row of `logits`.
    ///
    /// # Errors
    /// [`ModelError::NanLogit`] if a logit is NaN; [`ModelError::Length`] if there are none.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, ModelError> {
        let likeliest = greedy(logits)?;
        if self.options.temperature == 0.0 {
            return Ok(likeliest);
        }
        // One number a token, drawn or not, so that a token's number depends on its place alone.
        let draw = (self.random.next_u32() >> 8) as f32 / (1u32 << 24) as f32;
        let best = logits[likeliest as usize];
        if !best.is_finite() {
            return Ok(likeliest);
        }
        let weight = |logit: &f32| ((logit - best) / self.options.temperature).exp();
        self.candidates.clear();
        self.candidates.extend(logits.iter().map(weight).zip(0..).filter(|(weight, _)| *weight > 0.0));
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let top_k = self.options.top_k as usize;
        if (1..self.candidates.len()).contains(&top_k) {
            self.candidates.select_nth_unstable_by(top_k - 1, order);
            self.candidates.truncate(top_k);
        }
        self.candidates.sort_unstable_by(order);
        let total: f32 = self.candidates.iter().map(|(weight, _)| weight).sum();
        let mut kept = 0.0;
        let enough = self.options.top_p * total;
        let count = self.candidates.iter().position(|(weight, _)| {
            kept += weight;
            kept >= enough
        });
        self.candidates.truncate(count.map_or(self.candidates.len(), |last| last + 1));
        let total: f32 = self.candidates.iter().map(|(weight, _)| weight).sum();
        let mut left = draw * total;
        let drawn = self.candidates.iter().find(|(weight, _)| {
            left -= weight;
            left < 0.0
        });
        Ok(drawn.or(self.candidates.last()).map_or(likeliest, |(_, token)| *token))
    }
}

/// The most likely token of one row of logits, the lowest id among equals.
///
/// # Errors
/// [`ModelError::NanLogit`] if a logit is NaN; [`ModelError::Length`] if there are none.
pub fn greedy(logits: &[f32]) -> Result<u32, ModelError> {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(ModelError::NanLogit { token });
        }
        if *logit > best.1 {
            best = (token, *logit);
        }
    }
    if logits.is_empty() {
        return Err(ModelError::Length { argument: "logits", found: 0, expected: 1 });
    }
    Ok(best.0 as u32)
}

/// The natural logarithm of `token`'s probability under one row of `logits`.
///
/// # Errors
/// [`ModelError::NanLogit`] if a logit is NaN; [`ModelError::Token`] if there is no such token.
pub fn log_probability(logits: &[f32], token: u32) -> Result<f32, ModelError> {
    let best = logits[greedy(logits)? as usize];
    let chosen = logits.get(token as usize).ok_or(ModelError::Token { token, row: 0, vocab_size: logits.len() })?;
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - best).exp()).sum();
    Ok((f64::from(chosen - best) - sum.ln()) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(SamplingOptions { temperature, top_k, top_p, seed }).unwrap()
    }

    /// How often each of the tokens is drawn in `count` draws.
    fn drawn(mut sampler: Sampler, logits: &[f32], count: usize) -> Vec<usize> {
        let mut times = vec![0; logits.len()];
        (0..count).for_each(|_| times[sampler.choose(logits).unwrap() as usize] += 1);
        times
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals_and_refuses_nan() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, -1.0]).unwrap(), 1);
        assert_eq!(greedy(&[f32::NEG_INFINITY; 3]).unwrap(), 0);
        assert!(greedy(&[0.0, f32::NAN]).unwrap_err().to_string().contains("logit 1 is NaN"));
        assert!(greedy(&[]).is_err());
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        let logits = [0.0, 3f32.ln(), f32::NEG_INFINITY, 6f32.ln()];
        let times = drawn(sampler(1.0, 0, 1.0, 7), &logits, 10_000);
        assert_eq!(times[2], 0);
        for (token, share) in [(0, 0.1), (1, 0.3), (3, 0.6)] {
            assert!((times[token] as f64 / 1e4 - share).abs() < 0.02, "{times:?}");
        }
        let sharp = drawn(sampler(0.5, 0, 1.0, 7), &logits, 10_000);
        assert!((sharp[3] as f64 / 1e4 - 36.0 / 46.0).abs() < 0.02, "{sharp:?}");
    }

    #[test]
    fn top_k_and_top_p_cut_the_unlikely_off() {
        let logits = [0.0, 3f32.ln(), 0.5, 6f32.ln()];
        assert_eq!(drawn(sampler(1.0, 1, 1.0, 1), &logits, 100)[3], 100);
        let two = drawn(sampler(1.0, 2, 1.0, 1), &logits, 1000);
        assert!(two[0] + two[2] == 0 && two[1] > 250, "{two:?}");
        assert_eq!(drawn(sampler(1.0, 0, 0.5, 1), &logits, 100)[3], 100);
        let nucleus = drawn(sampler(1.0, 0, 0.7, 1), &logits, 1000);
        assert!(nucleus[0] + nucleus[2] == 0 && nucleus[1] > 250, "{nucleus:?}");
    }

    #[test]
    fn a_seed_decides_and_temperature_zero_is_greedy() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let tokens = |seed| {
            let mut sampler = sampler(1.0, 0, 1.0, seed);
            (0..20).map(|_| sampler.choose(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(tokens(3), tokens(3));
        assert_ne!(tokens(3), tokens(4));
        assert_eq!(sampler(0.0, 5, 0.1, 9).choose(&logits).unwrap(), greedy(&logits).unwrap());
    }

    #[test]
    fn options_that_make_no_sense_are_refused_by_name() {
        for (temperature, top_p, named) in
            [(-1.0, 1.0, "temperature"), (f32::NAN, 1.0, "temperature"), (1.0, 0.0, "top_p"), (1.0, 1.5, "top_p")]
        {
            let error = Sampler::new(SamplingOptions { temperature, top_p, ..Default::default() }).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let logits = [0.3, -2.0, 5.0, 1.0];
        let sum: f32 = (0..4).map(|token| log_probability(&logits, token).unwrap().exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert!(log_probability(&logits, 4).is_err() && log_probability(&[f32::NAN], 0).is_err());
    }
}
