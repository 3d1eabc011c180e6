//! The FFN side as a process of its own: how it is started, and what it does.

use super::board::Board;
use super::side::{self, Shape};
use super::stages::Pace;
use super::threads::{NAP, work_until};
use super::wire::Wire;
use crate::BenchError;
use crate::process::{Process, Program};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{ConnectOptions, GrpcControl};
use stepmesh_transport::{Clock, DeviceOptions, Provider};

/// How long it may take to end once it is told.
const ENDING: Duration = Duration::from_secs(5);

/// What [`serve`] is told, in this order, by the arguments that are added to a program's.
#[derive(Clone, Debug)]
pub struct FfnRole {
    /// The memory that the two processes share.
    pub board: PathBuf,
    /// The scheduler's URL.
    pub scheduler: String,
    /// The transport.
    pub provider: Provider,
    /// Layers of the model.
    pub layers: u32,
    /// Microbatches in flight.
    pub microbatches: u16,
    /// The CPU to run on.
    pub cpu: usize,
}

/// One that runs. Dropped, it is told to end, and ended if it does not.
pub(super) struct FfnProcess {
    process: Option<Process>,
    board: Board,
}

impl FfnProcess {
    pub(super) fn start(
        program: &Program,
        board: &Board,
        scheduler: &str,
        provider: Provider,
        shape: Shape,
        cpu: usize,
    ) -> Result<Self, BenchError> {
        let Shape { layers, microbatches } = shape;
        let numbers = [layers.to_string(), microbatches.to_string(), cpu.to_string()].map(Into::into);
        let told = [board.path().into(), scheduler.into(), provider.name().into()].into_iter().chain(numbers);
        Ok(Self { process: Some(program.start(told)?), board: board.clone() })
    }

    /// An error if it has ended.
    pub(super) fn look(&mut self) -> Result<(), BenchError> {
        if self.process.as_mut().is_some_and(Process::is_running) {
            return Ok(());
        }
        if let Some(process) = self.process.take() {
            process.finish(Instant::now() + ENDING)?;
        }
        Err(BenchError::Sequence("the FFN process has ended".into()))
    }
}

impl Drop for FfnProcess {
    fn drop(&mut self) {
        self.board.over.store(1, Ordering::Release);
        if let Some(process) = self.process.take() {
            let _ = process.finish(Instant::now() + ENDING);
        }
    }
}

/// Plays the FFN side until the process that measures says that it is over.
///
/// # Errors
/// It cannot join, or a member fails.
pub fn serve(role: &FfnRole) -> Result<(), BenchError> {
    let (board, clock) = (Board::open(Path::new(&role.board))?, Clock::system());
    let shape = Shape { layers: role.layers, microbatches: role.microbatches };
    let device = side::open(role.provider, &DeviceOptions::default())?;
    let device = Wire::new(board.clone()).between(device, 1, clock.clone());
    let endpoint = device.endpoint()?;
    let waker = endpoint.waker();
    let control = GrpcControl::connect(ConnectOptions::new(role.scheduler.as_str()), Box::new(move || waker.wake()))?;
    let pace = Pace::new(clock.clone(), board.clone(), 1);
    let mut serves = side::ffn((device, endpoint, Box::new(control)), shape, pace, clock)?;
    let is_over = || board.over.load(Ordering::Acquire) != 0;
    work_until(is_over, role.cpu, &board, 1, || Ok(serves.run_once(NAP)?))
}
