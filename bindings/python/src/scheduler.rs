//! A scheduler within this process, on a thread of its own.

use crate::error::Failure;
use crate::process::{self, Open};
use crate::shared::seconds;
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{BlockingClient, ConnectOptions, Token};
use stepmesh_mesh::scheduler::{Background, SchedulerOptions, ServeOptions, spawn};

/// How often a scheduler that waits for its members to leave looks whether they have.
const LOOK: Duration = Duration::from_millis(50);

struct Serving {
    background: Mutex<Option<Background>>,
    generation: u32,
}

impl Open for Serving {
    fn wake(&self) {}

    fn close(&self) {
        let background = self.background.lock().unwrap_or_else(PoisonError::into_inner).take();
        if self.generation == process::generation() {
            drop(background);
        } else {
            // Its thread is the parent's.
            std::mem::forget(background);
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.close();
    }
}

/// A scheduler. It serves until it is closed.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Scheduler {
    serving: Arc<Serving>,
    token: Option<Token>,
    /// Its address, as members are told it.
    #[pyo3(get)]
    url: String,
}

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (attention, ffn, listen="127.0.0.1:0", token=None, insecure=false, loss=3.0))]
    fn new(
        py: Python<'_>,
        attention: u32,
        ffn: u32,
        listen: &str,
        token: Option<String>,
        insecure: bool,
        loss: f64,
    ) -> PyResult<Self> {
        let mut deployment = SchedulerOptions::new(attention, ffn);
        deployment.loss = seconds(Some(loss))?;
        deployment.heartbeat = deployment.heartbeat.min(deployment.loss / 3);
        let mut options = ServeOptions::new(deployment);
        options.listen =
            listen.parse().map_err(|_| Failure::Invalid(format!("listen: `{listen}` is no IP address with a port")))?;
        let token = token.map(Token::new).transpose();
        let token = token.map_err(|error| Failure::Invalid(format!("token: {error}")))?;
        options.token = token.clone();
        options.insecure = insecure;
        // A program that closes its scheduler has no members left, or wants to be rid of them.
        options.drain = Duration::from_millis(500);
        let background = process::detached(py, || spawn(options));
        let background = background.map_err(|error| Failure::Invalid(error.to_string()))?;
        let url = background.url();
        let serving = Arc::new(Serving { background: Mutex::new(Some(background)), generation: process::generation() });
        process::register(&serving);
        Ok(Self { serving, token, url })
    }

    /// Waits until the deployment was complete and everybody has left; false after `timeout` seconds.
    #[pyo3(signature = (timeout=None))]
    fn wait_left(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        let connect = ConnectOptions::new(&self.url).token(self.token.clone());
        let client = process::detached(py, || BlockingClient::connect(&connect)).map_err(Failure::from)?;
        let (started, mut completed) = (Instant::now(), false);
        loop {
            let status = process::detached(py, || client.status()).map_err(Failure::from)?;
            // Who leaves in the wrong moment is never seen to have been there: joins are counted by the epoch.
            let everybody = u64::from(status.attention) + u64::from(status.ffn);
            completed |= status.complete || status.epoch > everybody;
            if completed && status.members.is_empty() {
                return Ok(true);
            }
            if started.elapsed() >= timeout {
                return Ok(false);
            }
            process::detached(py, || std::thread::sleep(LOOK));
            if process::is_ending() {
                return Err(Failure::Closed("the interpreter ends".to_owned()).into());
            }
            py.check_signals()?;
        }
    }

    /// Ends it; members that are left are told to leave.
    fn close(&self, py: Python<'_>) {
        process::detached(py, || self.serving.close());
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, py: Python<'_>, _raised: &Bound<'_, PyAny>) {
        self.close(py);
    }
}
