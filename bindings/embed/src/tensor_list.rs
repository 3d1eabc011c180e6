//! A list of tensors under keys of the user's, as it lies in a transfer: part 0 is the table, part 1 the tensors' bytes.
//!
//! ```text
//!   request   version 1, kind 1, pushes 2, pulls 2, servers 2, sequence 8, entries: pushes, then pulls
//!   reply     version 1, kind 1, entries 2, zero 4, five stamps of 8, copied bytes 8, entries or words for a failure
//!   entry     key 8, dtype 1, dimensions 1, zero 2, offset 4, bytes 4, then 4 for each dimension
//! ```
//!
//! All little-endian. What a peer has written is checked against itself and against the bytes that came with it.

use stepmesh_proto::Dtype;
use thiserror::Error;

/// The longest table, in bytes.
pub const MAX_LIST_BYTES: usize = 16 * 1024;
/// Dimensions that a tensor may have.
pub const MAX_DIMENSIONS: usize = 8;

const VERSION: u8 = 1;
const REQUEST_BYTES: usize = 16;
const REPLY_BYTES: usize = 48;
const ENTRY_BYTES: usize = 20;
/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 64;
const DTYPES: [Dtype; 15] = [
    Dtype::Bytes,
    Dtype::F32,
    Dtype::Bf16,
    Dtype::F16,
    Dtype::Fp8E4M3,
    Dtype::Fp8E5M2,
    Dtype::U8,
    Dtype::U16,
    Dtype::I32,
    Dtype::I64,
    Dtype::U32,
    Dtype::F64,
    Dtype::I8,
    Dtype::I16,
    Dtype::Bool,
];

/// Why a list cannot be sent, or bytes are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ListError {
    /// More tensors, or dimensions, than a table holds.
    #[error("the list of tensors takes {0} bytes, a table has {MAX_LIST_BYTES}: send fewer tensors")]
    Long(usize),
    /// The peer's bytes are no table.
    #[error("the peer broke the protocol: {0}")]
    Malformed(&'static str),
}

/// One tensor of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// The user's name for it.
    pub key: u64,
    /// Element type.
    pub dtype: Dtype,
    /// First byte among the tensors' bytes; zero for what is not sent.
    pub offset: u32,
    /// Bytes; of a tensor that is to come, the most.
    pub bytes: u32,
    dimensions: u8,
    shape: [u32; MAX_DIMENSIONS],
}

impl Entry {
    /// A tensor of this shape; none if it has too many dimensions or elements.
    pub fn new(key: u64, dtype: Dtype, shape: &[usize]) -> Option<Self> {
        let mut entry = Self { key, dtype, dimensions: shape.len() as u8, ..Self::default() };
        if shape.len() > MAX_DIMENSIONS {
            return None;
        }
        let mut bytes = dtype.bytes();
        for (to, from) in entry.shape.iter_mut().zip(shape) {
            *to = u32::try_from(*from).ok()?;
            bytes = bytes.checked_mul(*from)?;
        }
        entry.bytes = u32::try_from(bytes).ok()?;
        Some(entry)
    }

    /// Its shape.
    pub fn shape(&self) -> &[u32] {
        &self.shape[..usize::from(self.dimensions)]
    }

    fn encoded_bytes(&self) -> usize {
        ENTRY_BYTES + 4 * usize::from(self.dimensions)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.key.to_le_bytes());
        out.extend([self.dtype as u8, self.dimensions, 0, 0]);
        out.extend(self.offset.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        for dimension in self.shape() {
            out.extend(dimension.to_le_bytes());
        }
    }
}

/// Places tensors one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub struct List {
    end: usize,
}

impl List {
    /// Gives the entry its place.
    pub fn place(&mut self, entry: &mut Entry) -> usize {
        let offset = self.end.next_multiple_of(ALIGNMENT);
        entry.offset = offset as u32;
        self.end = offset + entry.bytes as usize;
        offset
    }

    /// Bytes so far.
    pub fn bytes(&self) -> usize {
        self.end
    }
}

/// What an attention instance asks of the FFN instances.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Request {
    /// Not a request: the sender stops, and says so.
    pub stops: bool,
    /// The sender's requests in order, from zero.
    pub sequence: u64,
    /// FFN instances that `pulls` are for, in equal shares.
    pub servers: u16,
    /// What is sent.
    pub pushes: Vec<Entry>,
    /// What is wanted back, server-major.
    pub pulls: Vec<Entry>,
}

/// When what happened to a request at an FFN instance, on its own clock, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Stamp {
    /// It was seen to be complete.
    pub received_ns: u64,
    /// It was handed to the program.
    pub process_ns: u64,
    /// The program answered.
    pub respond_ns: u64,
    /// The answer was about to be posted.
    pub posted_ns: u64,
    /// Bytes that were copied between slots and tensors of the program's.
    pub copied_bytes: u64,
}

/// An FFN instance's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// When.
    pub stamp: Stamp,
    /// The tensors, in the order of the pulls, or why there are none.
    pub result: Result<Vec<Entry>, String>,
}

impl Request {
    /// Whether the table can be written.
    pub fn check(&self) -> Result<(), ListError> {
        let entries = self.pushes.iter().chain(&self.pulls);
        check_length(REQUEST_BYTES + entries.map(Entry::encoded_bytes).sum::<usize>())
    }

    /// Writes the table into `out`, which is emptied first.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), ListError> {
        self.check()?;
        out.clear();
        out.extend([VERSION, u8::from(self.stops)]);
        out.extend((self.pushes.len() as u16).to_le_bytes());
        out.extend((self.pulls.len() as u16).to_le_bytes());
        out.extend(self.servers.to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        self.pushes.iter().chain(&self.pulls).for_each(|entry| entry.encode(out));
        Ok(())
    }

    /// Reads a table that came with `payload_bytes` bytes of tensors.
    pub fn decode(bytes: &[u8], payload_bytes: usize) -> Result<Self, ListError> {
        let mut reader = Reader(bytes);
        let [version, kind] = reader.array()?;
        if version != VERSION || kind > 1 {
            return Err(ListError::Malformed("a list of another version"));
        }
        let [pushes, pulls, servers] = [reader.u16()?, reader.u16()?, reader.u16()?];
        let sequence = reader.u64()?;
        let pushes = reader.entries(pushes, Some(payload_bytes))?;
        let pulls = reader.entries(pulls, None)?;
        if pulls.len() % usize::from(servers.max(1)) != 0 {
            return Err(ListError::Malformed("pulls that the servers cannot share equally"));
        }
        Ok(Self { stops: kind == 1, sequence, servers, pushes, pulls })
    }
}

impl Reply {
    /// Writes the table into `out`, which is emptied first. Words that do not fit are cut off.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), ListError> {
        let entries = self.result.as_deref().unwrap_or_default();
        check_length(REPLY_BYTES + entries.iter().map(Entry::encoded_bytes).sum::<usize>())?;
        out.clear();
        out.extend([VERSION, u8::from(self.result.is_err())]);
        out.extend((entries.len() as u16).to_le_bytes());
        out.extend([0; 4]);
        let Stamp { received_ns, process_ns, respond_ns, posted_ns, copied_bytes } = self.stamp;
        for stamp in [received_ns, process_ns, respond_ns, posted_ns, copied_bytes] {
            out.extend(stamp.to_le_bytes());
        }
        match &self.result {
            Ok(entries) => entries.iter().for_each(|entry| entry.encode(out)),
            Err(reason) => out.extend(reason.bytes().take(MAX_LIST_BYTES - REPLY_BYTES)),
        }
        Ok(())
    }

    /// Reads a table that came with `payload_bytes` bytes of tensors.
    pub fn decode(bytes: &[u8], payload_bytes: usize) -> Result<Self, ListError> {
        let mut reader = Reader(bytes);
        let [version, kind] = reader.array()?;
        if version != VERSION || kind > 1 {
            return Err(ListError::Malformed("a reply of another version"));
        }
        let entries = reader.u16()?;
        reader.array::<4>()?;
        let stamp = Stamp {
            received_ns: reader.u64()?,
            process_ns: reader.u64()?,
            respond_ns: reader.u64()?,
            posted_ns: reader.u64()?,
            copied_bytes: reader.u64()?,
        };
        let result = match kind {
            0 => Ok(reader.entries(entries, Some(payload_bytes))?),
            _ => Err(String::from_utf8_lossy(reader.0).into_owned()),
        };
        Ok(Self { stamp, result })
    }
}

fn check_length(bytes: usize) -> Result<(), ListError> {
    if bytes > MAX_LIST_BYTES { Err(ListError::Long(bytes)) } else { Ok(()) }
}

/// What is left to read.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], ListError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(ListError::Malformed("a list that ends too early"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, ListError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, ListError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ListError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Entries whose bytes, if they have any, lie within the payload and are what their shape says.
    fn entries(&mut self, count: u16, payload_bytes: Option<usize>) -> Result<Vec<Entry>, ListError> {
        let mut entries = Vec::with_capacity(usize::from(count).min(self.0.len() / ENTRY_BYTES));
        for _ in 0..count {
            let mut entry = Entry { key: self.u64()?, ..Entry::default() };
            let [dtype, dimensions, _, _] = self.array()?;
            entry.dtype =
                *DTYPES.get(usize::from(dtype)).ok_or(ListError::Malformed("an element type that does not exist"))?;
            (entry.offset, entry.bytes) = (self.u32()?, self.u32()?);
            if usize::from(dimensions) > MAX_DIMENSIONS {
                return Err(ListError::Malformed("too many dimensions"));
            }
            entry.dimensions = dimensions;
            let mut bytes = entry.dtype.bytes() as u64;
            for dimension in &mut entry.shape[..usize::from(dimensions)] {
                *dimension = self.u32()?;
                bytes = bytes.saturating_mul(u64::from(*dimension));
            }
            if bytes != u64::from(entry.bytes) {
                return Err(ListError::Malformed("a tensor whose bytes are not its shape's"));
            }
            if let Some(payload) = payload_bytes
                && (entry.offset as usize).checked_add(entry.bytes as usize).is_none_or(|end| end > payload)
            {
                return Err(ListError::Malformed("a tensor beyond the bytes that came"));
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry() -> impl Strategy<Value = Entry> {
        (any::<u64>(), 0..DTYPES.len(), proptest::collection::vec(0_usize..9, 0..4))
            .prop_map(|(key, dtype, shape)| Entry::new(key, DTYPES[dtype], &shape).unwrap())
    }

    fn placed(mut entries: Vec<Entry>) -> (Vec<Entry>, usize) {
        let mut list = List::default();
        entries.iter_mut().for_each(|entry| {
            list.place(entry);
        });
        (entries, list.bytes())
    }

    #[test]
    fn a_tensor_too_large_for_a_slot_is_none() {
        assert!(Entry::new(0, Dtype::F32, &[1 << 30, 4]).is_none());
        assert!(Entry::new(0, Dtype::F32, &[1; 9]).is_none());
        assert_eq!(Entry::new(0, Dtype::F32, &[]).unwrap().bytes, 4);
    }

    #[test]
    fn more_tensors_than_a_table_holds_are_refused() {
        let request = Request { pushes: vec![Entry::default(); 900], ..Request::default() };
        assert_eq!(request.encode(&mut Vec::new()), Err(ListError::Long(16 + 900 * 20)));
    }

    #[test]
    fn a_failure_says_why() {
        let reply = Reply { stamp: Stamp::default(), result: Err("no key 7".into()) };
        let mut bytes = Vec::new();
        reply.encode(&mut bytes).unwrap();
        assert_eq!(Reply::decode(&bytes, 0).unwrap(), reply);
    }

    #[test]
    fn a_tensor_outside_the_payload_is_refused() {
        let (pushes, bytes) = placed(vec![Entry::new(1, Dtype::U8, &[100]).unwrap()]);
        let mut table = Vec::new();
        Request { pushes, ..Request::default() }.encode(&mut table).unwrap();
        assert!(Request::decode(&table, bytes).is_ok());
        assert!(Request::decode(&table, bytes - 1).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            pushes in proptest::collection::vec(entry(), 0..6),
            pulls in proptest::collection::vec(entry(), 0..6),
            sequence: u64,
            stops: bool,
        ) {
            let (pushes, bytes) = placed(pushes);
            let request = Request { stops, sequence, servers: 1, pushes, pulls };
            let mut table = Vec::new();
            request.encode(&mut table).unwrap();
            prop_assert_eq!(Request::decode(&table, bytes).unwrap(), request.clone());
            let reply = Reply { stamp: Stamp { posted_ns: sequence, ..Stamp::default() }, result: Ok(request.pushes) };
            reply.encode(&mut table).unwrap();
            prop_assert_eq!(Reply::decode(&table, bytes).unwrap(), reply);
        }

        #[test]
        fn damaged_bytes_are_refused_or_are_a_list(mut table in proptest::collection::vec(any::<u8>(), 0..200), whole: bool) {
            if whole && table.len() > 2 {
                (table[0], table[1]) = (VERSION, table[1] & 1);
            }
            for list in [Request::decode(&table, 1000).map(|request| request.pushes),
                         Reply::decode(&table, 1000).map(|reply| reply.result.unwrap_or_default())].into_iter().flatten() {
                for entry in list {
                    prop_assert!(entry.offset as usize + entry.bytes as usize <= 1000);
                }
            }
        }
    }
}
